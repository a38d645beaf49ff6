"""If this fails, cheap products are no cheaper approximation of the direction, but another one."""

import pytest
import torch

from tekfac_edu.optim import Cost
from tekfac_edu.optim.eigenbasis import precondition
from tekfac_edu.optim.truncation import TruncatedBasis

from .networks import NETWORKS, batches, gaussian, orthogonal
from .one_step import every_basis
from .training import EVERY_STEP, assert_same_bits, parameters, train

# two operands rounded to 8 bits, four products, rounding errors that add up at random
BOUND = 0.02


@pytest.mark.parametrize("blocks", [(), (3,)], ids=["one", "blocks"])
@pytest.mark.parametrize("k", [60, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounded_products_are_near_and_are_rounded(dtype, k, blocks):
    formula = precondition if k == 60 else TruncatedBasis.precondition
    M, Q_out = gaussian(*blocks, 24, 60), orthogonal(*blocks, 24, seed=1)
    Q_in, D = orthogonal(*blocks, 60, seed=2)[..., :k], gaussian(*blocks, 24, k + (k < 60), seed=3)
    tensors = [tensor.to(dtype) for tensor in (M, Q_in, Q_out, D.square() + 0.1)]
    exact, cheap = formula(*tensors), formula(*tensors, "bfloat16")
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
    found = TruncatedBasis.precondition(M, torch.eye(3)[:, :2], torch.eye(1), D, "bfloat16")
    assert torch.equal(found, (1 / D).bfloat16().float())


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("input_rank", [None, 3])
@every_basis
def test_a_step_moves_nearly_as_in_full_and_keeps_the_same_statistics(
    method, eigenbasis, input_rank, network
):
    make, shape = NETWORKS[network]
    moved, states = [], []
    for precision in ("full", "bfloat16"):
        model, start = make(), make()
        cost = Cost(precision=precision, input_rank=input_rank, eigenbasis=eigenbasis)
        optimizer = method(model, 0.1, momentum=0.0, damping=0.1, cost=cost, **EVERY_STEP)
        train(model, optimizer, batches(shape, 1, N=8))
        moved.append(parameters(model) - parameters(start))
        states.append(optimizer.state_dict()["curvatures"])
    distance = (moved[1] - moved[0]).norm() / moved[0].norm()
    assert 0 < distance < BOUND
    assert_same_bits(*states)
