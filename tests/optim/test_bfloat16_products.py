"""If this fails, cheap products are no cheaper approximation of the direction, but another one."""

import pytest
import torch
from torch import nn

from tekfac_edu.optim import EKFAC, KFAC, TEKFAC, TKFAC
from tekfac_edu.optim.eigenbasis import precondition

from .networks import batches, cnn

METHODS = [KFAC, EKFAC, TKFAC, TEKFAC]
# two operands rounded to 8 bits, four products, rounding errors that add up at random
BOUND = 0.02


def problem(dtype, d_out=24, d_in=60, seed=0):
    draw = torch.Generator().manual_seed(seed)
    squares = [torch.randn(d, d, generator=draw, dtype=torch.float64) for d in (d_in, d_out)]
    Q_in, Q_out = (torch.linalg.qr(square)[0].to(dtype) for square in squares)
    M = torch.randn(d_out, d_in, generator=draw, dtype=torch.float64).to(dtype)
    D = torch.rand(d_out, d_in, generator=draw, dtype=torch.float64).to(dtype) + 0.1
    return M, Q_in, Q_out, D


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounded_products_are_near_and_are_rounded(dtype):
    exact, cheap = precondition(*problem(dtype)), precondition(*problem(dtype), "bfloat16")
    assert cheap.dtype == dtype
    distance = (cheap - exact).norm() / exact.norm()
    assert 1e-4 < distance < BOUND


def test_the_division_is_in_full():
    """An eigenvalue that bfloat16 would round to its neighbour still counts."""
    M, identity = torch.ones(1, 2), torch.eye(2)
    D = torch.tensor([[1.0, 1.0 + 2**-7 + 2**-9]])  # bfloat16 has 1 + 2⁻⁷ and 1 + 2⁻⁶
    found = precondition(M, identity, torch.eye(1), D, "bfloat16")
    assert torch.equal(found, (1 / D).bfloat16().float())
    assert not torch.equal(found, 1 / D.bfloat16().float())
    # the same with a third direction left out, whose share is as good as infinite
    M, D = torch.ones(1, 3), torch.cat([D, torch.tensor([[2.0**60]])], 1)
    found = precondition(M, torch.eye(3)[:, :2], torch.eye(1), D, "bfloat16")
    assert torch.equal(found, (1 / D).bfloat16().float())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_a_step_moves_nearly_as_in_full_and_keeps_the_same_statistics(method):
    moved, states = [], []
    for precision in ("full", "bfloat16"):
        model = cnn()
        before = nn.utils.parameters_to_vector(model.parameters()).detach()
        optimizer = method(model, 0.01, momentum=0.0, precision=precision)
        x, y = next(iter(batches((1, 6, 6), 8)))
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        moved.append(nn.utils.parameters_to_vector(model.parameters()).detach() - before)
        states.append(optimizer.curvatures[optimizer.layers[0]])
    distance = (moved[1] - moved[0]).norm() / moved[0].norm()
    assert 0 < distance < BOUND
    for name in ("Q_in", "Q_out", "eigenvalues"):
        assert torch.equal(getattr(states[0], name), getattr(states[1], name))


@pytest.mark.parametrize("precision", ["float16", "bf16", None, torch.bfloat16])
def test_other_precisions_are_refused(precision):
    with pytest.raises(ValueError, match="precision"):
        TEKFAC(nn.Linear(2, 2), 0.1, precision=precision)
