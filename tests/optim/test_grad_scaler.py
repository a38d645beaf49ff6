"""If this fails, scaled gradients become statistics, or a refusal breaks the optimizer."""

import pytest
import torch
from torch.nn import functional

from tekfac_edu.optim import TEKFAC

from .networks import batches, mlp
from .training import EVERY_STEP, assert_same_bits, everything, parameters, train


@pytest.mark.parametrize("attempt", ["scaled", "unscaled first", "with inf"])
def test_a_grad_scaler_is_refused_by_name_and_an_ordinary_step_still_works(attempt):
    model = mlp()
    optimizer = TEKFAC(model, 1e-3, **EVERY_STEP)
    scaler = torch.amp.GradScaler("cpu")
    stream = list(batches((4,), 3))
    x, y = stream[0]
    loss = functional.cross_entropy(model(x), y)
    scaler.scale(loss * torch.inf if attempt == "with inf" else loss).backward()
    if attempt == "unscaled first":
        scaler.unscale_(optimizer)
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match=r"GradScaler.*bfloat16"):
        scaler.step(optimizer)
    assert_same_bits(everything(model, optimizer), before)
    train(model, optimizer, stream)
    undisturbed = mlp()
    train(undisturbed, TEKFAC(undisturbed, 1e-3, **EVERY_STEP), stream)
    assert torch.equal(parameters(model), parameters(undisturbed))


def test_a_disabled_grad_scaler_is_no_scaler():
    model, plain = mlp(), mlp()
    optimizer, scaler = TEKFAC(model, 1e-3), torch.amp.GradScaler("cpu", enabled=False)
    (x, y), *_ = batches((4,), 1)
    scaler.scale(functional.cross_entropy(model(x), y)).backward()
    scaler.step(optimizer)
    scaler.update()
    train(plain, TEKFAC(plain, 1e-3), [(x, y)])
    assert torch.equal(parameters(model), parameters(plain))
