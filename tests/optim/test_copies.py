"""If this fails, a copied or pickled run is a broken one, or one that disturbs its original."""

import pytest
import torch

from tekfac_edu.optim import TEKFAC

from .networks import batches, mlp
from .scenarios.copying import every_way
from .scenarios.resuming import through_a_file
from .training import (
    UNEVEN,
    assert_same_bits,
    backward,
    every_method,
    everything,
    parameters,
    seeded,
    train,
)

STREAM = list(batches((4,), 9))


def trained(method, fisher="empirical", steps=3):
    model = mlp()
    with seeded(4):
        optimizer = method(model, 0.005, damping=0.1, fisher=fisher, **UNEVEN)
    train(model, optimizer, STREAM[:steps])
    return model, optimizer


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("fisher", ["empirical", "mc"])
@every_way
@every_method
def test_a_copied_pair_trains_by_itself_and_equally(method, duplicate, fisher, steps):
    model, optimizer = trained(method, fisher, steps)
    at_the_copy = everything(model, optimizer)
    copied_model, copied_optimizer = duplicate((model, optimizer))
    train(model, optimizer, STREAM[steps:])
    expected = everything(model, optimizer)
    assert_same_bits(everything(copied_model, copied_optimizer), at_the_copy)
    train(copied_model, copied_optimizer, STREAM[steps:])
    assert_same_bits(everything(copied_model, copied_optimizer), expected)
    assert_same_bits(everything(model, optimizer), expected)


@every_way
def test_the_optimizer_may_come_first_and_a_copy_may_be_copied(duplicate):
    model, optimizer = trained(TEKFAC)
    pair = optimizer, model
    for _ in range(3):
        pair = duplicate(pair)
    train(model, optimizer, STREAM[3:])
    train(pair[1], pair[0], STREAM[3:])
    assert_same_bits(everything(pair[1], pair[0]), everything(model, optimizer))


@every_way
def test_a_scheduler_may_be_copied_with_its_optimizer(duplicate):
    model, optimizer = trained(TEKFAC)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)

    def run(model, optimizer, scheduler, stream):
        for batch in stream:
            train(model, optimizer, [batch])
            scheduler.step()

    run(model, optimizer, scheduler, STREAM[3:5])
    others = duplicate((model, optimizer, scheduler))
    run(model, optimizer, scheduler, STREAM[5:])
    run(*others, STREAM[5:])
    assert optimizer.param_groups[0]["lr"] == 0.005 / 8
    assert_same_bits(everything(*others[:2]), everything(model, optimizer))


@every_way
@every_method
def test_a_copied_model_is_a_plain_model_that_reports_to_nobody(method, duplicate):
    """The copy trains on other data between the original's backward pass and its step."""
    undisturbed, optimizer = trained(method)
    train(undisturbed, optimizer, STREAM[3:])

    model, optimizer = trained(method)
    for x, y in STREAM[3:]:
        backward(model, optimizer, x, y)
        other = duplicate(model)
        torch.nn.functional.cross_entropy(other(-5 * x), y).backward()
        torch.optim.SGD(other.parameters(), 0.1).step()
        optimizer.step()
    assert torch.equal(parameters(model), parameters(undisturbed))


@every_way
def test_a_copied_model_takes_an_optimizer_of_its_own(duplicate):
    model, _watching = trained(TEKFAC)
    other = duplicate(model)
    train(other, TEKFAC(other, 0.005, damping=0.1, **UNEVEN), STREAM[:3])
    fresh = mlp()
    fresh.load_state_dict(model.state_dict())
    train(fresh, TEKFAC(fresh, 0.005, damping=0.1, **UNEVEN), STREAM[:3])
    assert torch.equal(parameters(other), parameters(fresh))


def test_an_average_of_the_model_is_kept_as_usual():
    """swa_utils copies the model at construction and calls the copy in training mode."""
    model, optimizer = trained(TEKFAC)
    average = torch.optim.swa_utils.AveragedModel(model)
    for x, y in STREAM[3:]:
        backward(model, optimizer, x, y)
        average(x)
        optimizer.step()
        average.update_parameters(model)
    alone, optimizer = trained(TEKFAC)
    train(alone, optimizer, STREAM[3:])
    assert torch.equal(parameters(model), parameters(alone))


def test_the_weights_of_a_watched_model_load_where_this_package_is_unknown():
    """A state_dict has tensors only: hooks leave no trace in it."""
    model, _ = trained(TEKFAC)
    assert list(through_a_file(model.state_dict())) == list(mlp().state_dict())


@every_way
def test_copies_of_copies_of_a_model_do_not_grow(duplicate):
    model, optimizer = trained(TEKFAC)
    hooks = []
    for _ in range(3):
        model, optimizer = duplicate((model, optimizer))
        hooks.append(sum(len(module._forward_hooks) for module in model.modules()))
    assert hooks == [2, 2, 2]
