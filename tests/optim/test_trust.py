"""If this fails, a step may be longer than the trust region allows, or shorter for no reason."""

import pytest
import torch

from tekfac_edu.optim import EKFAC, TEKFAC
from tekfac_edu.optim.trust import shrinkage

from .networks import batches, cnn, gaussian, mlp
from .oracles import assert_close
from .training import EVERY_STEP, all_finite, backward, every_method, parameters, train

KAPPA = 1e-4


def moved(method, trust, lr=5.0, network=mlp, shape=(4,)):
    """What one step without momentum changes, and its optimizer."""
    model = network()
    optimizer = method(model, lr, momentum=0.0, damping=0.1, trust=trust, **EVERY_STEP)
    start = parameters(model)
    train(model, optimizer, batches(shape, 1))
    return parameters(model) - start, optimizer


def test_shrinkage_is_the_root_of_what_is_allowed_over_what_is_predicted():
    D, M = (
        [gaussian(3, 4), gaussian(2, 5, seed=1)],
        [gaussian(3, 4, seed=2), gaussian(2, 5, seed=3)],
    )
    D = [d if (d * m).sum() > 0 else -d for d, m in zip(D, M, strict=True)]
    lrs, dampings = [0.5, 2.0], [0.1, torch.tensor(0.3, dtype=torch.float64)]
    predicted = sum(
        float(lr**2 * damping * (d * m).sum())
        for d, m, lr, damping in zip(D, M, lrs, dampings, strict=True)
    )
    for kappa, expected in ((predicted / 9, 1 / 3), (predicted, 1.0), (9 * predicted, 1.0)):
        nu = shrinkage(D, M, lrs, dampings, kappa)
        assert_close(nu, torch.tensor(expected, dtype=torch.float64).numpy(), rtol=1e-12)


def test_no_gradient_is_not_shrunk():
    nothing = [torch.zeros(2, 3)]
    assert shrinkage(nothing, nothing, [0.1], [0.1], KAPPA) == 1


@every_method
def test_all_layers_keep_their_course_and_share_one_factor(method):
    free, _ = moved(method, None)
    bound, optimizer = moved(method, KAPPA)
    (nu,) = optimizer.shrunk
    assert 0 < nu < 0.9
    assert_close(bound, (nu * free).numpy(), rtol=1e-12)


@every_method
def test_a_step_that_is_short_enough_is_the_same_to_the_bit(method):
    free, _ = moved(method, None, lr=1e-3)
    bound, optimizer = moved(method, 1.0, lr=1e-3)
    assert optimizer.shrunk[0] == 1
    assert torch.equal(free, bound)


@pytest.mark.parametrize("method", [EKFAC, TEKFAC])
def test_what_is_not_factored_is_not_shrunk(method):
    free, _ = moved(method, None, network=cnn, shape=(1, 6, 6))
    bound, optimizer = moved(method, KAPPA, network=cnn, shape=(1, 6, 6))
    assert optimizer.shrunk[0] < 0.9
    norm = slice(18, 22)  # scale and shift of the batch norm, behind 2 · 9 weights
    assert torch.equal(free[norm], bound[norm])
    assert not torch.equal(free[:18], bound[:18])


@every_method
def test_a_learning_rate_of_ten_thousand_stays_finite(method):
    model = mlp()
    optimizer = method(model, 1e4, damping=0.1, trust=KAPPA, **EVERY_STEP)
    losses = train(model, optimizer, batches((4,), 40))
    assert all_finite(model, optimizer)
    assert max(losses) < 50


def test_the_report_says_how_often_it_acted_in_the_last_interval():
    model = mlp()
    optimizer = TEKFAC(model, 5.0, damping=0.1, trust=KAPPA, interval=4, warmup=0)
    for step, batch in enumerate(batches((4,), 6)):
        optimizer.param_groups[0]["lr"] = 5.0 if step == 4 else 1e-6
        backward(model, optimizer, *batch)
        optimizer.step()
    assert "trust region acted in 1 of the last 4 steps" in str(optimizer.report())
    assert "trust region" not in str(moved(TEKFAC, None)[1].report())


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), "0.1", True])
def test_other_values_are_refused(wrong):
    with pytest.raises(ValueError, match="trust"):
        TEKFAC(mlp(), 0.1, trust=wrong)
