"""If this fails, a step is taken with statistics that were never captured, or half a step is."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from tekfac_edu.optim import TEKFAC

from .networks import CLASSES, batches, mlp
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

BATCH = next(batches((4,), 1))


def refused_step(model, optimizer, error, match):
    """The step raises, and has changed nothing."""
    before = everything(model, optimizer)
    with pytest.raises(error, match=match):
        optimizer.step()
    assert_same_bits(everything(model, optimizer), before)


def test_a_sparse_gradient_is_named():
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, CLASSES))
    optimizer = TEKFAC(model, 1e-3)
    functional.cross_entropy(model(torch.arange(5)), torch.arange(5) % CLASSES).backward()
    refused_step(model, optimizer, RuntimeError, r"0\.weight.*sparse=False")


@every_method
def test_a_forward_pass_under_eval_gives_no_statistics_and_the_step_says_so(method):
    model = mlp()
    optimizer = method(model, 1e-3)
    model.eval()
    backward(model, optimizer, *BATCH)
    refused_step(model, optimizer, RuntimeError, r"0 \(Linear\).*train\(\)")
    model.train()
    train(model, optimizer, [BATCH])


def test_one_part_of_the_model_under_eval_is_named():
    model = mlp()
    optimizer = TEKFAC(model, 1e-3)
    model[2].eval()
    backward(model, optimizer, *BATCH)
    refused_step(model, optimizer, RuntimeError, r"2 \(Linear\).*plain=\['2'\]")


def test_a_weight_used_without_calling_its_module_is_named():
    model = mlp()
    optimizer = TEKFAC(model, 1e-3)
    x, y = BATCH
    hidden = torch.tanh(functional.linear(x, model[0].weight, model[0].bias))
    functional.cross_entropy(model[2](hidden), y).backward()
    refused_step(model, optimizer, RuntimeError, r"0 \(Linear\).*no call")


@pytest.mark.parametrize("fisher", ["mc", "exact"])
@every_method
def test_a_forgotten_accumulate_fisher_is_an_error_only_when_statistics_are_due(method, fisher):
    model = mlp()
    optimizer = method(model, 1e-3, fisher=fisher, interval=2, warmup=0)
    x, y = BATCH
    for _ in range(2):
        functional.cross_entropy(model(x), y).backward()
        refused_step(model, optimizer, RuntimeError, f"{fisher}.*accumulate_fisher")
        train(model, optimizer, [BATCH])
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        before = parameters(model)
        optimizer.step()
        assert not torch.equal(parameters(model), before)
        optimizer.zero_grad()


def test_accumulate_fisher_says_what_is_wrong_with_its_outputs():
    model = mlp()
    x = BATCH[0]
    with pytest.raises(RuntimeError, match="empirical"):
        TEKFAC(model, 1e-3).accumulate_fisher(model(x))
    optimizer = TEKFAC(model, 1e-3, fisher="exact")
    with pytest.raises(ValueError, match=r"likelihood.*'poisson'"):
        optimizer.accumulate_fisher(model(x), "poisson")
    with pytest.raises(ValueError, match=r"\(N, C\).*\(36,\)"):
        optimizer.accumulate_fisher(model(x).flatten())
    with pytest.raises(RuntimeError, match="before backward"):
        optimizer.accumulate_fisher(model(x).detach())
    with pytest.raises(RuntimeError, match="training mode"):
        optimizer.accumulate_fisher(mlp()(x))
    model.eval()
    with pytest.raises(RuntimeError, match="training mode"):
        optimizer.accumulate_fisher(model(x))


def test_accumulate_fisher_after_backward_says_to_call_it_before():
    model = mlp()
    optimizer = TEKFAC(model, 1e-3, fisher="exact")
    outputs = model(BATCH[0])
    functional.cross_entropy(outputs, BATCH[1]).backward()
    with pytest.raises(RuntimeError, match="accumulate_fisher before backward"):
        optimizer.accumulate_fisher(outputs)


def test_freezing_a_layer_leaves_it_where_it_is_and_the_others_go_on():
    model = mlp()
    optimizer = TEKFAC(model, 1e-3, **UNEVEN)
    stream = list(batches((4,), 6))
    train(model, optimizer, stream[:2])
    model[0].requires_grad_(False)
    frozen, other = model[0].weight.clone(), model[2].weight.clone()
    train(model, optimizer, stream[2:])
    assert torch.equal(model[0].weight, frozen)
    assert not torch.equal(model[2].weight, other)
    model[0].requires_grad_(True)
    train(model, optimizer, stream)
    assert not torch.equal(model[0].weight, frozen)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_freezing_half_of_a_layer_is_refused(name):
    """Weight and bias are one matrix; a half of it cannot be preconditioned as the whole was."""
    model = mlp()
    optimizer = TEKFAC(model, 1e-3, **EVERY_STEP)
    train(model, optimizer, [BATCH])
    getattr(model[0], name).requires_grad_(False)
    backward(model, optimizer, *BATCH)
    refused_step(model, optimizer, RuntimeError, r"0 \(Linear\).*new optimizer")


def test_a_layer_that_was_frozen_at_construction_takes_plain_steps_when_it_thaws():
    """It is no layer of the optimizer's: momentum SGD with the lr of its group."""
    model, plain = mlp(), mlp()
    model[0].requires_grad_(False)
    optimizer = TEKFAC(model, 0.3, momentum=0.8, **EVERY_STEP)
    model[0].requires_grad_(True)
    sgd = torch.optim.SGD(plain[0].parameters(), 0.3, momentum=0.8)
    for x, y in batches((4,), 3):
        backward(model, optimizer, x, y)
        for p, q in zip(plain[0].parameters(), model[0].parameters(), strict=True):
            p.grad = q.grad.clone()
        optimizer.step()
        sgd.step()
    assert torch.equal(parameters(model[0]), parameters(plain[0]))


@pytest.mark.parametrize("steps", [0, 2])
@every_method
def test_dampings_of_weight_and_bias_that_part_are_refused_before_anything_moves(method, steps):
    """They agreed at construction; a schedule or a search has then set one of them."""
    model = mlp()
    own = [{"params": [model[2].bias], "lr": 1e-4}]
    optimizer = method(model, 1e-3, param_groups=own, **EVERY_STEP)
    stream = list(batches((4,), 4))
    train(model, optimizer, stream[:steps])
    optimizer.param_groups[0]["damping"] = 0.5
    backward(model, optimizer, *stream[steps])
    refused_step(model, optimizer, ValueError, r"2 \(Linear\).*\b0.01.*\b0.5")
    optimizer.param_groups[0]["damping"] = 1e-2
    optimizer.step()
    train(model, optimizer, stream[steps + 1 :])
    undisturbed = mlp()
    own = [{"params": [undisturbed[2].bias], "lr": 1e-4}]
    train(undisturbed, method(undisturbed, 1e-3, param_groups=own, **EVERY_STEP), stream)
    assert torch.equal(parameters(model), parameters(undisturbed))


def test_precondition_says_what_is_wrong():
    model = mlp()
    optimizer = TEKFAC(model, 1e-3)
    with pytest.raises(RuntimeError, match=r"0 \(Linear\).*step first"):
        optimizer.precondition(model[0], torch.zeros(5, 5))
    train(model, optimizer, [BATCH])
    with pytest.raises(ValueError, match=r"\(5, 5\).*\(5, 4\)"):
        optimizer.precondition(model[0], torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"Tanh.*0 \(Linear\), 2 \(Linear\)"):
        optimizer.precondition(model[1], torch.zeros(5, 5))


def test_an_error_in_a_closure_leaves_the_optimizer_usable():
    model = mlp()
    optimizer = TEKFAC(model, 1e-3, **EVERY_STEP)
    before = parameters(model)

    def closure():
        raise KeyError("no more data")

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert torch.equal(parameters(model), before)
    train(model, optimizer, [BATCH])
