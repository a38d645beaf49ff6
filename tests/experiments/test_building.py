"""If this fails, a run trains another network, by another rule or at another rate than it says."""

import dataclasses
import io
import math

import pytest
import torch

from tekfac_edu import optim
from tekfac_edu.experiments.building import (
    build_images,
    build_model,
    build_optimizer,
    build_schedule,
)
from tekfac_edu.experiments.configuration import Configuration, Cost
from tekfac_edu.experiments.methods import KRONECKER, METHODS, OPTIMIZERS, DecoupledSGD
from tekfac_edu.experiments.networks import NETWORKS

from . import tiny


def digits_model(**changes):
    configuration = tiny(**changes)
    return configuration, build_model(configuration, build_images(configuration, None, "cpu"))


# images


def test_images_are_loaded_once_for_a_race():
    first, again = (build_images(tiny(seed=seed), None, "cpu") for seed in (0, 1))
    assert first.x_train is again.x_train


def test_subsets_and_held_out_parts_are_as_asked():
    sizes = {}
    for held_out in (False, True):
        images = build_images(
            tiny(train_images=400, test_images=30, held_out=held_out), None, "cpu"
        )
        sizes[held_out] = len(images.x_train), len(images.x_test)
    assert sizes == {False: (400, 30), True: (360, 40)}


# models


def test_weights_follow_from_the_seed_alone():
    torch.manual_seed(5)
    one = digits_model()[1].state_dict()
    torch.manual_seed(6)
    again, other = digits_model()[1].state_dict(), digits_model(seed=1)[1].state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_every_optimizer_begins_with_the_same_weights():
    states = [digits_model(optimizer=name)[1].state_dict() for name in OPTIMIZERS]
    for state in states[1:]:
        assert all(torch.equal(state[name], states[0][name]) for name in state)


@pytest.mark.parametrize(
    ("changes", "shapes"),
    [
        ({}, [(8, 64), (10, 8)]),
        ({"widths": None}, [(256, 64), (128, 256), (10, 128)]),
        ({"widths": ()}, [(10, 64)]),
        ({"model": "autoencoder", "widths": (9, 3)}, [(9, 64), (3, 9), (9, 3), (64, 9)]),
    ],
)
def test_dense_networks_have_the_widths_asked_for(changes, shapes):
    _, model = digits_model(**changes)
    assert [(*p.shape,) for p in model.parameters() if p.ndim == 2] == shapes


def test_the_autoencoder_has_the_papers_layers_if_none_are_asked_for():
    _, model = digits_model(model="autoencoder", widths=None)
    outs = [p.shape[0] for p in model.parameters() if p.ndim == 2]
    assert outs == [1000, 500, 250, 30, 250, 500, 1000, 64]


def test_convolutional_networks_have_the_width_asked_for():
    for width, expected in ((None, 16), (4, 4)):
        _, model = digits_model(model="resnet20", widths=None, width=width)
        assert next(model.parameters()).shape == (expected, 1, 3, 3)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_built_and_has_the_outputs_of_its_task(name):
    """On images of the shape that its row names, by the size that its row names."""
    network = NETWORKS[name]
    small = {"width": 2, "widths": (4,)}[network.sized_by]
    model = network.build(network.image, 7, small)
    assert network.side in (None, network.image[-1])
    outputs = model(torch.rand(3, *network.image))
    pixels = math.prod(network.image)
    assert outputs.shape == (3, {"label": 7, "image": pixels}[network.task.target])
    default = Configuration(name, "cifar10").replace(**{network.sized_by: network.size})
    assert getattr(default, network.sized_by) == network.size


def test_a_network_has_its_task():
    found = {
        name: (n.task.score, n.task.likelihood, n.task.target, n.task.unit)
        for name, n in NETWORKS.items()
    }
    classified = ("accuracy", "categorical", "label", False)
    assert found.pop("autoencoder") == ("error", "bernoulli", "image", True)
    assert set(found) == {"mlp", "resnet20", "vgg16"} and set(found.values()) == {classified}


# optimizers


def test_names_are_the_methods():
    assert OPTIMIZERS == ("sgd", "adam", "kfac", "ekfac", "tkfac", "tekfac")
    assert KRONECKER == ("kfac", "ekfac", "tkfac", "tekfac")
    for name in KRONECKER:
        configuration, model = digits_model(optimizer=name)
        optimizer = build_optimizer(configuration, model)
        assert type(optimizer).__name__ == METHODS[name].label == name.upper()


@pytest.mark.parametrize("name", KRONECKER)
@pytest.mark.parametrize("eigenbasis", ["eigh", "qr"])
def test_a_method_takes_the_eigenbases_that_its_row_names(name, eigenbasis):
    case = digits_model(optimizer=name, cost=Cost(eigenbasis=eigenbasis))
    if eigenbasis in METHODS[name].eigenbases:
        build_optimizer(*case)
    else:
        with pytest.raises(ValueError, match='"qr"'):
            build_optimizer(*case)


def called(monkeypatch, **settings):
    """(arguments, named arguments) that TEKFAC is called with."""
    calls = []

    class Spy(METHODS["tekfac"].make):
        def __init__(self, *arguments, **named):
            calls.append((arguments, named))
            super().__init__(*arguments, **named)  # it takes them

    row = dataclasses.replace(METHODS["tekfac"], make=Spy)
    monkeypatch.setitem(METHODS, "tekfac", row)
    configuration, model = digits_model(**settings)
    build_optimizer(configuration, model)
    ((given, *positional), named), *_ = calls
    assert given is model and len(calls) == 1
    return positional, named


COST = Cost(3.0, 7, 5, "qr", True, "bfloat16")
SETTINGS = {"lr": 0.7, "momentum": 0.3, "weight_decay": 0.2, "damping": 0.5, "fisher": "exact"}
SETTINGS |= {"interval": 3, "warmup": 4, "decay": 0.6, "cost": COST}
SETTINGS |= {"trust": 0.02, "positions": "summed"}


@pytest.mark.parametrize("rule", ["paper", "added", "by-trace"])
def test_every_setting_arrives(rule, monkeypatch):
    (lr,), named = called(monkeypatch, damping_rule=rule, **SETTINGS)
    assert lr == 0.7
    expected = {n: v for n, v in SETTINGS.items() if n not in ("lr", "damping")}
    damping = {"paper": optim.Paper, "added": optim.Added, "by-trace": optim.ByTrace}[rule]
    assert named == expected | {"damping": damping(0.5)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_is_decoupled_in_all_of_them(name):
    """One step with and one without: they differ by −lr · weight_decay · θ and by nothing else."""
    results = []
    for decay in (0.0, 0.25):
        configuration, model = digits_model(optimizer=name, weight_decay=decay, lr=0.1)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = build_optimizer(configuration, model)
        x = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        torch.nn.functional.cross_entropy(model(x), torch.arange(32) % 10).backward()
        optimizer.step()
        results.append([p.detach().clone() for p in model.parameters()])
    for p, plain, decayed in zip(before, *results, strict=True):
        torch.testing.assert_close(decayed, plain - 0.1 * 0.25 * p, rtol=1e-5, atol=1e-7)


def test_decay_alone_shrinks_by_the_current_learning_rate():
    for name in ("sgd", "adam"):
        configuration, model = digits_model(optimizer=name, weight_decay=0.5, lr=0.1)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = build_optimizer(configuration, model)
        for rate in (0.1, 0.05):
            for group in optimizer.param_groups:
                group["lr"] = rate
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
        for p, q in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(p.detach(), q * (1 - 0.05) * (1 - 0.025))


def test_what_has_no_gradient_does_not_decay():
    configuration, model = digits_model(optimizer="sgd", weight_decay=0.5)
    first, *others = model.parameters()
    before = first.detach().clone()
    for p in others:
        p.grad = torch.zeros_like(p)
    build_optimizer(configuration, model).step()
    assert torch.equal(first, before)


def test_adam_has_the_momentum_as_its_first_beta():
    (group,) = build_optimizer(*digits_model(optimizer="adam", momentum=0.8)).param_groups
    assert group["betas"] == (0.8, 0.999)


def test_sgd_without_decay_is_torchs_bit_for_bit():
    ends = []
    for ours in (True, False):
        configuration, model = digits_model(optimizer="sgd", momentum=0.7)
        if ours:
            optimizer = build_optimizer(configuration, model)
        else:
            optimizer = torch.optim.SGD(model.parameters(), configuration.lr, momentum=0.7)
        draw = torch.Generator().manual_seed(0)
        for _ in range(4):
            optimizer.zero_grad()
            x = torch.rand(16, 1, 8, 8, generator=draw)
            torch.nn.functional.cross_entropy(model(x), torch.arange(16) % 10).backward()
            optimizer.step()
        ends.append(torch.nn.utils.parameters_to_vector(model.parameters()))
    assert type(optimizer) is not DecoupledSGD
    assert torch.equal(*ends)


# the schedule


def by_formula(schedule, epochs, epoch):
    """What the learning rate is multiplied with; epoch counts with fractions, from 0 to epochs."""
    return {
        "constant": 1.0,
        "cosine": (1 + math.cos(math.pi * epoch / epochs)) / 2,
        "step": 0.1 ** ((epoch >= epochs / 2) + (epoch >= 3 * epochs / 4)),
    }[schedule]


def rates(schedule, epochs, batches, stopped_at=None):
    """The learning rate of every step; taken up from what was saved, if stopped somewhere."""
    configuration = Configuration(lr=0.3, epochs=epochs, schedule=schedule)

    def begin():
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], configuration.lr)
        return optimizer, build_schedule(configuration, optimizer, batches)

    pair, found = begin(), []
    for step in range(epochs * batches + 1):
        if step == stopped_at:
            saved = io.BytesIO()
            torch.save([part.state_dict() for part in pair], saved)
            saved.seek(0)
            pair = begin()
            for part, state in zip(pair, torch.load(saved, weights_only=True), strict=True):
                part.load_state_dict(state)
        optimizer, scheduler = pair
        assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
@pytest.mark.parametrize(("epochs", "batches"), [(8, 100), (20, 11), (3, 7), (1, 3), (1, 1)])
def test_the_schedule_is_its_formula_at_every_step(schedule, epochs, batches):
    expected = [
        0.3 * by_formula(schedule, epochs, step / batches) for step in range(epochs * batches + 1)
    ]
    assert rates(schedule, epochs, batches) == pytest.approx(expected, rel=0, abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
def test_the_schedule_of_a_run_taken_up_is_the_same_to_the_last_bit(schedule):
    whole = rates(schedule, 4, 5)
    for step in range(21):
        assert rates(schedule, 4, 5, stopped_at=step) == whole


@pytest.mark.parametrize("name", KRONECKER)
def test_positions_are_summed_where_the_method_can(name):
    """So that one configuration serves a race of all."""
    optimizer = build_optimizer(*digits_model(optimizer=name, positions="summed"))
    summed = name in ("tkfac", "tekfac")
    assert optimizer.settings.positions == ("summed" if summed else "apart")
