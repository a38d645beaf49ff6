"""If this fails, a bad number gets into a run and spoils what it has learned."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from tekfac_edu.optim import TEKFAC

from .networks import CLASSES, batches, cnn, mlp
from .training import (
    EVERY_STEP,
    UNEVEN,
    all_finite,
    assert_same_bits,
    backward,
    every_method,
    everything,
    parameters,
    train,
)


@pytest.fixture(autouse=True)
def no_warning_passes_unseen():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@every_method
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_named(method, bad, steps):
    model = mlp()
    optimizer = method(model, 0.01, damping=0.1, weight_decay=0.01, **UNEVEN)
    stream = list(batches((4,), 6))
    train(model, optimizer, stream[:steps])
    before = everything(model, optimizer)
    backward(model, optimizer, *stream[steps])
    model[2].bias.grad[1] = bad
    with pytest.warns(RuntimeWarning, match=r"not finite in 2\.bias$"):
        optimizer.step()
    assert_same_bits(everything(model, optimizer), before)
    train(model, optimizer, stream[steps:])

    undisturbed = mlp()
    other = method(undisturbed, 0.01, damping=0.1, weight_decay=0.01, **UNEVEN)
    train(undisturbed, other, stream)
    assert_same_bits(everything(model, optimizer), everything(undisturbed, other))


def test_a_parameter_under_plain_sgd_stops_the_step_as_well():
    model = cnn()
    optimizer = TEKFAC(model, 1e-3, **EVERY_STEP)
    (x, y), *_ = batches((1, 6, 6), 1)
    before = parameters(model)
    backward(model, optimizer, x, y)
    model[1].weight.grad[0] = torch.nan
    with pytest.warns(RuntimeWarning, match=r"1\.weight"):
        optimizer.step()
    assert torch.equal(parameters(model), before)


def test_gradients_whose_norm_overflows_are_finite_all_the_same():
    """Their squares are not, in float32; each number by itself is."""
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, CLASSES))
    optimizer = TEKFAC(model, 1e-30, **EVERY_STEP)
    (x, y), *_ = batches((4,), 1)
    backward(model, optimizer, x.float(), y)
    model[1].weight.grad.fill_(1e25)
    before = model[1].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model[1].weight, before - 1e-30 * 1e25)


def test_the_warning_points_at_the_line_that_called_step():
    model = mlp()
    optimizer = TEKFAC(model, 1e-3)
    backward(model, optimizer, *next(batches((4,), 1)))
    model[0].weight.grad[0, 0] = torch.nan
    with pytest.warns(RuntimeWarning) as caught:
        optimizer.step()
    assert caught[0].filename == __file__


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("fisher", ["mc", "exact"])
@every_method
def test_statistics_that_are_not_finite_are_named_and_left_out(method, fisher, steps):
    """Finite gradients, and a Fisher that is not: one example's outputs overflow before it."""
    model = mlp()
    optimizer = method(model, 0.005, damping=0.1, fisher=fisher, **EVERY_STEP)
    stream = list(batches((4,), 4))
    train(model, optimizer, stream[:steps])
    before = everything(model, optimizer)["optimizer"]["curvatures"]
    optimizer.zero_grad()
    outputs = model(stream[2][0])
    scale = torch.ones(12, 1, dtype=torch.float64)
    scale[3] = torch.inf
    optimizer.accumulate_fisher(outputs * scale)
    functional.cross_entropy(outputs, stream[2][1]).backward()
    with pytest.warns(RuntimeWarning) as caught:
        optimizer.step()
    assert sorted(str(w.message).split(":")[0] for w in caught) == ["0 (Linear)", "2 (Linear)"]
    after = everything(model, optimizer)["optimizer"]["curvatures"]
    for name in before:
        assert_same_bits(after[name]["factors"], before[name]["factors"])
    train(model, optimizer, stream[3:])
    assert all_finite(model, optimizer)


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
@pytest.mark.parametrize("fisher", ["mc", "exact"])
@every_method
def test_a_nan_in_the_batch_skips_the_step_under_every_fisher(method, fisher, likelihood):
    """As under the empirical one: the loop need not know what kind of Fisher it trains with."""
    model = mlp()
    optimizer = method(model, 5e-4, fisher=fisher, **EVERY_STEP)
    stream = list(batches((4,), 3))
    train(model, optimizer, stream[:1])
    before = everything(model, optimizer)
    x, y = stream[1]
    x[0, 0] = torch.nan
    optimizer.zero_grad()
    outputs = model(x)
    optimizer.accumulate_fisher(outputs, likelihood)
    functional.cross_entropy(outputs, y).backward()
    with pytest.warns(RuntimeWarning, match="step skipped"):
        optimizer.step()
    assert_same_bits(everything(model, optimizer), before)
    train(model, optimizer, stream[2:])
    assert all_finite(model, optimizer)
