"""If this fails, training that was stopped and resumed is not the training that never stopped."""

import io
from itertools import islice

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from tekfac_edu.optim import EKFAC, TEKFAC

from .networks import CLASSES, batches, cnn, double_precision, mlp
from .training import UNEVEN, assert_same_bits, every_method, everything, parameters, train

STEPS = 7  # one more than the period of intervals 2, 3, 1


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def other_weights(model):
    """The same architecture from another start, so that nothing is right by chance."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-0.5)
    return model


def stream_for(make, dtype):
    shape = (1, 6, 6) if make is cnn else (4,)
    return [(x.to(dtype), y) for x, y in batches(shape, STEPS)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fisher", ["empirical", "mc"])
@every_method
def test_training_goes_on_bit_for_bit_from_any_step(method, fisher, dtype):
    make = cnn if dtype == torch.float32 else mlp
    stream = stream_for(make, dtype)

    def build(model, seed):
        generator = torch.Generator().manual_seed(seed) if fisher == "mc" else None
        settings = {"fisher": fisher, "momentum": 0.8, "generator": generator, **UNEVEN}
        return model, method(model, 0.05, damping=0.1, weight_decay=0.01, **settings)

    model, optimizer = build(make().to(dtype), seed=5)
    saved = []
    for batch in stream:
        saved.append(through_a_file(everything(model, optimizer)))
        train(model, optimizer, [batch])
    expected = everything(model, optimizer)
    for step, state in enumerate(saved):
        resumed, again = build(other_weights(make().to(dtype)), seed=6)
        resumed.load_state_dict(state["model"])
        again.load_state_dict(state["optimizer"])
        assert_same_bits(everything(resumed, again), state)
        train(resumed, again, stream[step:])
        assert_same_bits(everything(resumed, again), expected)


@pytest.mark.parametrize("scheduler", ["StepLR", "OneCycleLR"])
@every_method
def test_a_schedule_of_the_learning_rate_is_resumed_too(method, scheduler):
    stream = stream_for(mlp, torch.float64)

    def build(model):
        optimizer = method(model, 0.05, damping=0.1, **UNEVEN)
        if scheduler == "StepLR":
            return model, optimizer, StepLR(optimizer, step_size=2, gamma=0.5)
        return model, optimizer, OneCycleLR(optimizer, max_lr=0.05, total_steps=STEPS + 1)

    def run(model, optimizer, schedule, stream):
        for batch in stream:
            train(model, optimizer, [batch])
            schedule.step()

    model, optimizer, schedule = build(mlp())
    run(model, optimizer, schedule, stream[:3])
    states = through_a_file([part.state_dict() for part in (model, optimizer, schedule)])
    start = optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]
    run(model, optimizer, schedule, stream[3:])
    assert optimizer.param_groups[0]["lr"] != start[0]
    assert (optimizer.param_groups[0]["momentum"] != start[1]) == (scheduler == "OneCycleLR")

    resumed = build(other_weights(mlp()))
    for part, state in zip(resumed, states, strict=True):
        part.load_state_dict(state)
    run(*resumed, stream[3:])
    assert_same_bits(everything(*resumed[:2]), everything(model, optimizer))


@every_method
def test_the_learning_rate_of_a_scheduler_is_the_one_that_is_used(method):
    """Under momentum 0 a step of half the learning rate is half the step."""
    steps = []
    for factor in (1.0, 0.5):
        model = mlp()
        optimizer = method(model, 0.2, damping=0.1, momentum=0.0)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _, factor=factor: factor)
        before = parameters(model)
        train(model, optimizer, batches((4,), 1))
        steps.append(parameters(model) - before)
    assert torch.allclose(steps[1], steps[0] / 2, rtol=1e-10, atol=0)


def trained(method, model, **options):
    optimizer = method(model, 0.05, damping=0.1, **UNEVEN, **options)
    train(model, optimizer, islice(batches((4,), 3), 3))
    return optimizer


def wider():
    return double_precision(
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES))
    )


def deeper():
    return double_precision(
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES), nn.Linear(3, 3))
    )


def state_of_sgd():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    train(model, optimizer, batches((4,), 1))
    return optimizer.state_dict()


FOREIGN = {
    "of another method": (lambda: trained(EKFAC, mlp()).state_dict(), "EKFAC.*TEKFAC"),
    "of other sizes": (lambda: trained(TEKFAC, wider()).state_dict(), r"\b0 .*\(5, 5\).*\(6, 5\)"),
    "of other layers": (lambda: trained(TEKFAC, deeper()).state_dict(), r"'3'"),
    "of SGD": (state_of_sgd, "TEKFAC.*curvatures"),
    "of one group less": (lambda: trained(TEKFAC, mlp()).state_dict(), "group"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_state_is_refused_by_name_and_nothing_is_loaded(kind):
    foreign, message = FOREIGN[kind]
    model = mlp()
    own_group = [{"params": model[0].bias, "lr": 0.01}] if kind == "of one group less" else None
    optimizer = trained(TEKFAC, model, param_groups=own_group)
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(foreign())
    assert_same_bits(everything(model, optimizer), before)
    train(model, optimizer, batches((4,), 2))


def test_a_state_whose_plain_parameters_have_other_sizes_is_refused():
    """Else the momentum of an embedding of another vocabulary waits to break a step half done."""

    def build(words):
        model = double_precision(
            lambda: nn.Sequential(nn.Embedding(words, 4), nn.Flatten(), nn.Linear(8, CLASSES))
        )
        optimizer = TEKFAC(model, 0.1)
        batch = torch.arange(6).reshape(3, 2) % words, torch.arange(3)
        train(model, optimizer, [batch])
        return model, optimizer

    (model, optimizer), (_, foreign) = build(7), build(9)
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=r"0\.weight"):
        optimizer.load_state_dict(foreign.state_dict())
    assert_same_bits(everything(model, optimizer), before)


def test_a_generator_of_another_device_is_started_anew_and_the_rest_is_loaded():
    """A CUDA generator's state has 16 bytes, a CPU generator's 5056: what map_location leaves."""
    options = {"fisher": "mc", "generator": torch.Generator().manual_seed(1)}
    model = mlp()
    state = trained(TEKFAC, model, **options).state_dict()
    fresh = TEKFAC(model, 0.5, fisher="mc", generator=torch.Generator().manual_seed(2))
    with pytest.warns(RuntimeWarning, match="generator"):
        fresh.load_state_dict(state | {"generator": torch.zeros(16, dtype=torch.uint8)})
    loaded = fresh.state_dict()
    assert_same_bits(loaded | {"generator": None}, state | {"generator": None})
    train(model, fresh, batches((4,), 1))


def test_a_state_is_a_snapshot_of_the_statistics():
    model = mlp()
    optimizer = trained(TEKFAC, model)
    state = optimizer.state_dict()["curvatures"]
    before = through_a_file(state)
    train(model, optimizer, batches((4,), 4))
    assert_same_bits(state, before)
