"""If this fails, a layer whose forward pass is run twice (to save memory) counts twice, or not."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tekfac_edu.optim import TEKFAC

from .networks import CLASSES, batches, double_precision
from .scenarios.accumulating import step_in_parts
from .training import EVERY_STEP, UNEVEN, assert_same_bits, every_method, everything, train

every_kind = pytest.mark.parametrize("use_reentrant", [True, False])


class Net(nn.Module):
    """Two blocks, each behind a checkpoint if asked for, and a head; or one block used twice."""

    def __init__(self, shared=False):
        super().__init__()
        self.one = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
        self.other = self.one if shared else nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.head = nn.Linear(4, CLASSES)
        self.use_reentrant = None

    def forward(self, x):
        for block in (self.one, self.other):
            if self.use_reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.head(x)


def trained(method, use_reentrant, shared=False, fisher="empirical", parts=1):
    model = double_precision(lambda: Net(shared))
    model.use_reentrant = use_reentrant
    optimizer = method(model, 0.01, damping=0.1, fisher=fisher, **UNEVEN)
    for x, y in batches((4,), 6):
        x.requires_grad_()  # a reentrant checkpoint has gradients only if its input asks for them
        step_in_parts(model, optimizer, (x, y), torch.arange(len(x)).reshape(parts, -1).tolist())
    return everything(model, optimizer)


@pytest.mark.parametrize("shared", [False, True], ids=["blocks", "one block twice"])
@every_kind
@every_method
def test_statistics_are_those_without_checkpoints(method, use_reentrant, shared):
    expected = trained(method, None, shared)
    assert_same_bits(trained(method, use_reentrant, shared), expected)


@every_kind
def test_two_parts_of_a_batch_stay_two_parts(use_reentrant):
    assert_same_bits(trained(TEKFAC, use_reentrant, parts=2), trained(TEKFAC, None, parts=2))


def test_the_exact_fisher_goes_through_checkpoints_without_reentry():
    expected = trained(TEKFAC, None, fisher="exact")
    assert_same_bits(trained(TEKFAC, False, fisher="exact"), expected)


def test_the_exact_fisher_refuses_reentrant_checkpoints_by_name():
    """They hide their layers from autograd.grad; training mode has nothing to do with it."""
    with pytest.raises(RuntimeError, match=r"one\.0 \(Linear\).*use_reentrant=False"):
        trained(TEKFAC, True, fisher="exact")


@every_kind
def test_a_forward_pass_that_is_not_trained_on_counts_nothing(use_reentrant):
    results = []
    for peek in (False, True):
        model = double_precision(Net)
        model.use_reentrant = use_reentrant
        optimizer = TEKFAC(model, 0.01, damping=0.1, **EVERY_STEP)
        for x, y in batches((4,), 3):
            x.requires_grad_()
            if peek:
                model(-3 * x)
            train(model, optimizer, [(x, y)])
        results.append(everything(model, optimizer))
    assert_same_bits(*results)
