"""If this fails, a line of an ordinary training loop means something else with these optimizers."""

import warnings

import pytest
import torch
from torch import nn

from tekfac_edu.optim import TEKFAC

from .networks import batches, mlp
from .training import (
    EVERY_STEP,
    UNEVEN,
    assert_same_bits,
    backward,
    every_method,
    everything,
    parameters,
    train,
)


@pytest.mark.parametrize("fisher", ["empirical", "mc", "exact"])
@every_method
def test_a_closure_is_called_once_and_its_loss_comes_back(method, fisher):
    runs = []
    for with_closure in (False, True):
        model = mlp()
        optimizer = method(model, 1e-3, fisher=fisher, **UNEVEN)
        calls = []
        for x, y in batches((4,), 4):
            if with_closure:
                loss = optimizer.step(
                    lambda x=x, y=y, model=model, optimizer=optimizer, calls=calls: (
                        calls.append(1) or backward(model, optimizer, x, y)
                    )
                )
                assert loss.requires_grad and len(calls) == optimizer.steps
            else:
                train(model, optimizer, [(x, y)])
        runs.append(everything(model, optimizer))
    assert_same_bits(*runs)


def test_step_without_a_closure_returns_none():
    model = mlp()
    optimizer = TEKFAC(model, 1e-3)
    backward(model, optimizer, *next(batches((4,), 1)))
    assert optimizer.step() is None


@every_method
def test_groups_train_by_their_own_settings(method):
    """Layers are independent of each other within a step: each group equals an optimizer whose
    settings all are the group's."""
    first = {"lr": 0.006, "momentum": 0.5, "weight_decay": 0.1, "damping": 0.3}
    rest = {"lr": 0.005, "momentum": 0.8, "weight_decay": 0.0, "damping": 0.1}
    batch = next(batches((4,), 1))
    both, by_first, by_rest = mlp(), mlp(), mlp()
    own = [{"params": list(both[0].parameters()), **first}]
    train(both, method(both, **rest, param_groups=own), [batch])
    train(by_first, method(by_first, **first), [batch])
    train(by_rest, method(by_rest, **rest), [batch])
    assert torch.equal(parameters(both[0]), parameters(by_first[0]))
    assert torch.equal(parameters(both[2]), parameters(by_rest[2]))
    assert not torch.equal(parameters(by_first[0]), parameters(by_rest[0]))


@every_method
def test_the_momentum_of_a_group_is_its_own(method):
    """Two steps on one batch: the second differs by momentum times the first."""
    moved = {}
    for momentum in (0.0, 0.5):
        model = mlp()
        optimizer = method(model, 0.0, momentum=0.9, damping=0.1, **UNEVEN)
        optimizer.param_groups[0]["momentum"] = momentum
        start = parameters(model)
        for x, y in [next(batches((4,), 1))] * 2:
            optimizer.param_groups[0]["lr"] = 0.0 if optimizer.steps == 0 else 1.0
            backward(model, optimizer, x, y)
            optimizer.step()
        moved[momentum] = parameters(model) - start
    # lr 0 leaves the model, so both steps have one direction but for the statistics' average
    assert torch.allclose(moved[0.5], 1.5 * moved[0.0], rtol=1e-6, atol=0)


@every_method
def test_a_setting_of_a_group_may_be_changed_between_steps(method):
    changed, constant = mlp(), mlp()
    batch = next(batches((4,), 1))
    optimizer = method(changed, 0.6, damping=0.7, momentum=0.0)
    optimizer.param_groups[0].update(lr=0.02, damping=0.2, weight_decay=0.3)
    train(changed, optimizer, [batch])
    settings = {"damping": 0.2, "momentum": 0.0, "weight_decay": 0.3}
    train(constant, method(constant, 0.02, **settings), [batch])
    assert torch.equal(parameters(changed), parameters(constant))


@every_method
def test_clipping_before_the_step_only_rescales_it(method):
    """Statistics come from what flowed back, not from .grad: the direction stays."""
    moved, states = [], []
    for clip in (False, True):
        model = mlp()
        optimizer = method(model, 0.01, damping=0.1, momentum=0.0, **EVERY_STEP)
        start = parameters(model)
        backward(model, optimizer, *next(batches((4,), 1)))
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01 if clip else torch.inf)
        optimizer.step()
        moved.append(parameters(model) - start)
        states.append(optimizer.state_dict()["curvatures"])
    assert norm > 0.1
    assert torch.allclose(moved[1], moved[0] * (0.01 / norm), rtol=1e-4, atol=0)
    assert_same_bits(*states)


@every_method
def test_a_step_without_gradients_is_harmless(method):
    model, undisturbed = mlp(), mlp()
    optimizer = method(model, 1e-3, weight_decay=0.1, **EVERY_STEP)
    before = parameters(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        optimizer.zero_grad()
        optimizer.step()
    assert torch.equal(parameters(model), before)
    stream = list(batches((4,), 3))
    train(model, optimizer, stream)
    train(undisturbed, method(undisturbed, 1e-3, weight_decay=0.1, **EVERY_STEP), stream)
    assert torch.equal(parameters(model), parameters(undisturbed))


def test_hooks_around_the_step_are_called():
    model = mlp()
    optimizer = TEKFAC(model, 1e-3)
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    train(model, optimizer, batches((4,), 1))
    assert called == ["before", "after"]


@every_method
def test_a_layer_called_with_its_input_as_a_keyword(method):
    class ByKeyword(nn.Sequential):
        def forward(self, x):
            return self[2](input=self[1](self[0](input=x)))

    by_keyword = ByKeyword(*mlp())
    plain = mlp()
    for model in (by_keyword, plain):
        train(model, method(model, 1e-3, **EVERY_STEP), batches((4,), 3))
    assert torch.equal(parameters(by_keyword), parameters(plain))
