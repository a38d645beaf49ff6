"""If this fails, activations are kept that no step will use, or a statistic comes from nowhere."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from tekfac_edu.optim import TEKFAC

from .test_lifetime import is_held, watched_storage
from .training import EVERY_STEP, every_method

every_fisher = pytest.mark.parametrize("fisher", ["empirical", "mc", "exact"])


class Remembering(nn.Module):
    """Three layers; `seen` are the storages of the last activations between them."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.seen = []

    def forward(self, x):
        early = torch.tanh(self.first(x))
        late = torch.tanh(self.middle(early))
        self.seen = [watched_storage(early), watched_storage(late)]
        return self.last(late)


def a_pass(model, optimizer, run_backward=True):
    """Forward and backward pass on a batch that nobody else holds; what is still held of it."""
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    outputs = model(x)
    if optimizer.settings.fisher != "empirical" and outputs.requires_grad:
        optimizer.accumulate_fisher(outputs)
    loss = functional.cross_entropy(outputs, y)
    if run_backward and loss.requires_grad:
        loss.backward()
    del x, outputs, loss
    return [is_held(storage) for storage in model.seen]


@every_fisher
@every_method
def test_activations_are_held_until_the_step_and_only_when_statistics_are_due(method, fisher):
    model = Remembering()
    optimizer = method(model, 1e-4, fisher=fisher, interval=(3, 1, 3), warmup=0)
    held = []
    for _ in range(7):
        held.append(a_pass(model, optimizer))
        optimizer.step()
        assert not any(is_held(storage) for storage in model.seen)
        optimizer.zero_grad()
    assert held == [[step % 3 == 0] * 2 for step in range(7)]


@every_method
def test_by_default_twenty_steps_take_statistics_and_then_every_tenth(method):
    model = Remembering()
    optimizer = method(model, 1e-4)
    held = []
    for _ in range(41):
        held.append(all(a_pass(model, optimizer)))
        optimizer.step()
        optimizer.zero_grad()
    assert held == [step < 20 or step % 10 == 0 for step in range(41)]


def test_zero_grad_lets_go_of_a_batch_that_was_not_used():
    model = Remembering()
    optimizer = TEKFAC(model, 1e-4, **EVERY_STEP)
    assert all(a_pass(model, optimizer))
    optimizer.zero_grad()
    assert not any(is_held(storage) for storage in model.seen)


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_the_next_batch_lets_go_of_one_that_was_not_used(fisher):
    """A loop may give up a batch (`continue`); at the latest after the next step it is gone."""
    model = Remembering()
    optimizer = TEKFAC(model, 1e-4, fisher=fisher, **EVERY_STEP)
    a_pass(model, optimizer)
    given_up = model.seen
    a_pass(model, optimizer)
    optimizer.step()
    assert not any(is_held(storage) for storage in given_up)


@every_fisher
@every_method
def test_a_skipped_step_lets_go_too(method, fisher):
    model = Remembering()
    optimizer = method(model, 1e-4, fisher=fisher, **EVERY_STEP)
    assert all(a_pass(model, optimizer))
    model.first.weight.grad[0, 0] = torch.nan
    with pytest.warns(RuntimeWarning):
        optimizer.step()
    assert not any(is_held(storage) for storage in model.seen)


@every_fisher
def test_passes_that_do_not_train_leave_nothing_behind(fisher):
    model = Remembering()
    optimizer = TEKFAC(model, 1e-4, fisher=fisher, **EVERY_STEP)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert a_pass(model, optimizer) == [False, False]
    model(torch.randn(6, 4))  # in training mode, and no backward pass
    assert [is_held(storage) for storage in model.seen] == [False, False]
    model.eval()
    functional.cross_entropy(model(torch.randn(3, 4)), torch.arange(3)).backward()
    assert [is_held(storage) for storage in model.seen] == [False, False]
