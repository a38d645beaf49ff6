"""If this fails, training that was stopped and resumed is not the training that never stopped."""

from dataclasses import fields
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from tekfac_edu.optim import EKFAC, KFAC, TEKFAC, Added, ByTrace, Cost
from tekfac_edu.optim.settings import Settings

from .networks import CLASSES, batches, cnn, double_precision, mlp
from .scenarios.resuming import assert_resumes_from_any_step, other_weights, through_a_file
from .training import (
    UNEVEN,
    assert_same_bits,
    differences,
    every_method,
    everything,
    parameters,
    seeded,
    train,
)

STEPS = 7  # one more than the period of intervals 2, 3, 1


def stream_for(make, dtype):
    shape = (1, 6, 6) if make is cnn else (4,)
    return [(x.to(dtype), y) for x, y in batches(shape, STEPS)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fisher", ["empirical", "mc"])
@every_method
def test_training_goes_on_bit_for_bit_from_any_step(method, fisher, dtype):
    make = cnn if dtype == torch.float32 else mlp
    stream = stream_for(make, dtype)

    settings = {"fisher": fisher, "momentum": 0.8, "weight_decay": 0.01, **UNEVEN}

    def build(model, seed):
        with seeded(seed):
            return method(model, 0.5, damping=0.1, **settings)

    runs = partial(build, seed=5), partial(build, seed=6)
    assert_resumes_from_any_step(lambda: make().to(dtype), *runs, stream)


@pytest.mark.parametrize("scheduler", ["StepLR", "OneCycleLR"])
@every_method
def test_a_schedule_of_the_learning_rate_is_resumed_too(method, scheduler):
    stream = stream_for(mlp, torch.float64)

    def build(model):
        optimizer = method(model, 0.5, damping=0.1, **UNEVEN)
        if scheduler == "StepLR":
            return model, optimizer, StepLR(optimizer, step_size=2, gamma=0.5)
        return model, optimizer, OneCycleLR(optimizer, max_lr=0.5, total_steps=STEPS + 1)

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
        optimizer = method(model, 0.02, damping=0.1, momentum=0.0)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _, factor=factor: factor)
        before = parameters(model)
        train(model, optimizer, batches((4,), 1))
        steps.append(parameters(model) - before)
    assert torch.allclose(steps[1], steps[0] / 2, rtol=1e-10, atol=0)


def trained(method, model, stream=None, **options):
    optimizer = method(model, 0.5, **{"damping": 0.1} | UNEVEN | options)
    train(model, optimizer, batches((4,), 3) if stream is None else stream)
    return optimizer


def with_one(path, value, settings):
    """Settings as plain data, one of them (or one of its fields, after a dot) another."""
    name, _, inner = path.partition(".")
    return settings | {name: settings[name] | {inner: value} if inner else value}


# what decides a number: how a run has it set, and another value that it could have had
DECIDING = {
    "fisher": (TEKFAC, {"fisher": "exact"}, "empirical"),
    "seed": (TEKFAC, {"fisher": "mc"}, 6),
    "interval": (TEKFAC, {}, (1, 1, 1)),
    "decay": (TEKFAC, {"decay": 0.6}, 0.95),
    "warmup": (TEKFAC, {"warmup": 5}, 20),
    "trust": (TEKFAC, {"trust": 1e-3}, None),
    "positions": (TEKFAC, {"positions": "summed"}, "apart"),
    "damping.rule": (KFAC, {"damping": Added(0.1)}, "Paper"),
    "damping.multiplier": (TEKFAC, {"damping": ByTrace(0.1, multiplier=2.0)}, 1.0),
    "damping.floor": (TEKFAC, {"damping": ByTrace(0.1, floor=1e3)}, 1e-8),
    "cost.factor_rows": (TEKFAC, {"cost": Cost(factor_rows=1)}, None),
    "cost.eigenvalue_examples": (TEKFAC, {"cost": Cost(eigenvalue_examples=5)}, None),
    "cost.input_rank": (TEKFAC, {"cost": Cost(input_rank=3)}, None),
    "cost.eigenbasis": (TEKFAC, {"cost": Cost(eigenbasis="qr")}, "eigh"),
    "cost.stagger": (TEKFAC, {"cost": Cost(stagger=True)}, False),
    "cost.precision": (TEKFAC, {"cost": Cost(precision="bfloat16")}, "full"),
}


def test_every_setting_is_in_the_table_above():
    flat = {name for name in DECIDING if "." not in name}
    assert flat | {"damping", "cost"} == {field.name for field in fields(Settings)}
    for name, kind in (("damping", ByTrace), ("cost", Cost)):
        # the λ of a rule is what groups have that give none of their own; theirs is in the groups
        inside = {field.name for field in fields(kind)} - {"damping"}
        ours = {path.partition(".")[2] for path in DECIDING if path.startswith(name + ".")}
        assert ours - {"rule"} == inside


@pytest.mark.parametrize("path", DECIDING)
def test_an_optimizer_of_other_settings_takes_over_those_of_the_state(path):
    """And each of them matters: with the other value, the same state ends elsewhere."""
    method, options, other = DECIDING[path]
    stream, model = stream_for(cnn, torch.float64), cnn()
    with seeded(5):
        optimizer = trained(method, model, stream[:3], **options)
    at_the_stop = through_a_file(everything(model, optimizer))
    settings = optimizer.settings
    train(model, optimizer, stream[3:])
    expected = everything(model, optimizer)

    def continued(settings):
        resumed = other_weights(cnn())
        again = method(resumed, 0.5)
        resumed.load_state_dict(at_the_stop["model"])
        again.load_state_dict(at_the_stop["optimizer"] | {"settings": settings})
        train(resumed, again, stream[3:])
        return again.settings, everything(resumed, again)

    same = at_the_stop["optimizer"]["settings"]
    found, end = continued(same)
    assert found == settings
    assert_same_bits(end, expected)
    _, elsewhere = continued(with_one(path, other, same))
    assert differences(elsewhere["model"], expected["model"])


FOREIGN_SETTINGS = {
    "one less": (lambda s: {k: v for k, v in s.items() if k != "decay"}, "this version.*interval"),
    "one more": (lambda s: s | {"factor_decay": 0.95}, "this version.*factor_decay"),
    "no dict": (lambda s: "empirical", "this version.*empirical"),
    "an unknown rule": (lambda s: with_one("damping.rule", "Adaptive", s), "damping.*Adaptive"),
    "a rule without its λ": (lambda s: s | {"damping": {"rule": "Added"}}, "damping"),
    "an unknown cost": (lambda s: with_one("cost.positions", 3, s), "cost.*positions"),
    "a bad number": (lambda s: s | {"interval": (1, 0, 1)}, r"interval.*\b0\b"),
    "a fisher of its own": (lambda s: s | {"fisher": "type2"}, "fisher.*type2"),
}


@pytest.mark.parametrize("kind", FOREIGN_SETTINGS)
def test_settings_of_a_foreign_version_are_refused_by_name_and_nothing_is_loaded(kind):
    change, message = FOREIGN_SETTINGS[kind]
    foreign = trained(TEKFAC, mlp(), interval=1).state_dict()
    model = mlp()
    optimizer = trained(TEKFAC, model)
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(foreign | {"settings": change(foreign["settings"])})
    assert_same_bits(everything(model, optimizer), before)


def test_settings_that_the_method_cannot_have_are_refused():
    optimizer = trained(KFAC, mlp())
    state = optimizer.state_dict()
    settings = with_one("cost.eigenbasis", "qr", state["settings"])
    with pytest.raises(ValueError, match=r"qr.*EKFAC and TEKFAC"):
        optimizer.load_state_dict(state | {"settings": settings})


NUMPY = {
    "lr": {"lr": np.float64(1e-3)},
    "damping": {"damping": np.float32(0.1)},
    "a rule": {"damping": ByTrace(np.float64(0.1), multiplier=np.int64(2))},
    "a cost": {"cost": Cost(factor_rows=np.float64(2), input_rank=np.int64(3))},
    "interval": {"interval": np.int64(3)},
    "a group": {"param_groups": [{"params": [], "lr": np.float64(0.1)}]},
}


@pytest.mark.parametrize("kind", NUMPY)
def test_numbers_of_numpy_are_no_obstacle_to_loading_a_state(kind):
    """As a sweep over np.logspace hands them in: with weights_only=True torch would refuse them."""
    model = mlp()
    settings = {"lr": 1e-3} | NUMPY[kind]
    for group in settings.get("param_groups", []):
        group["params"] = list(model[0].parameters())
    optimizer = TEKFAC(model, **settings)
    extra = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer.add_param_group({"params": extra, "lr": np.float64(0.1)})
    train(model, optimizer, batches((4,), 1))
    through_a_file(optimizer.state_dict())


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
    "of a version without settings": (
        lambda: {k: v for k, v in trained(TEKFAC, mlp()).state_dict().items() if k != "settings"},
        "TEKFAC.*settings",
    ),
    "of one group more": (
        lambda: trained_in_groups(lambda model: [model[0].bias]).state_dict(),
        r"groups of \[4\] tensors here, of \[1, 3\]",
    ),
}


def trained_in_groups(choose):
    model = mlp()
    return trained(TEKFAC, model, param_groups=[{"params": choose(model)}])


def test_a_state_of_groups_of_other_sizes_is_refused_by_name():
    optimizer = trained_in_groups(lambda model: [model[0].bias])
    foreign = trained_in_groups(lambda model: list(model[0].parameters())).state_dict()
    before = through_a_file(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"groups of \[1, 3\] tensors here, of \[2, 2\]"):
        optimizer.load_state_dict(foreign)
    assert_same_bits(optimizer.state_dict(), before)


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("midst", range(4))
@every_method
def test_a_state_may_be_loaded_in_the_midst_of_another_run(method, midst, at):
    """Whether statistics are due at the next step is then the state's to say, not that run's."""
    stream, interval = list(batches((4,), 6)), {"interval": 2}
    model, other = mlp(), other_weights(mlp())
    optimizer = trained(method, model, stream[:at], **interval)
    again = trained(method, other, stream[:midst], **interval)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    assert again.capture.wanted == (set(again.layers) if at % 2 == 0 else set())
    for each in ((model, optimizer), (other, again)):
        train(*each, stream[at:])
    assert_same_bits(everything(other, again), everything(model, optimizer))


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_state_is_refused_by_name_and_nothing_is_loaded(kind):
    foreign, message = FOREIGN[kind]
    model = mlp()
    optimizer = trained(TEKFAC, model)
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


def test_a_state_is_a_snapshot_of_the_statistics():
    model = mlp()
    optimizer = trained(TEKFAC, model)
    state = optimizer.state_dict()["curvatures"]
    before = through_a_file(state)
    train(model, optimizer, batches((4,), 4))
    assert_same_bits(state, before)
