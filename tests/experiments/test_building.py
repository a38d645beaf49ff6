"""If this fails, a run trains another network, by another rule or at another rate than it says."""

import math

import pytest
import torch

from tekfac_edu.experiments import building
from tekfac_edu.experiments.building import (
    build_images,
    build_model,
    build_optimizer,
    learning_rate_factor,
)
from tekfac_edu.experiments.configuration import OPTIMIZERS
from tekfac_edu.optim import EKFAC, KFAC, TEKFAC, TKFAC

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


# optimizers


def test_names_are_the_methods():
    kinds = dict(zip(OPTIMIZERS[2:], (KFAC, EKFAC, TKFAC, TEKFAC), strict=True))
    for name, kind in kinds.items():
        configuration, model = digits_model(optimizer=name)
        assert type(build_optimizer(configuration, model)) is kind


def test_every_setting_arrives():
    settings = {
        "lr": 0.7,
        "momentum": 0.3,
        "weight_decay": 0.2,
        "damping": 0.5,
        "damping_rule": "added",
        "damping_policy": "trace",
        "fisher": "exact",
        "interval": 3,
        "warmup_steps": 4,
        "factor_decay": 0.6,
        "scale_decay": 0.8,
        "eigenbasis": "qr",
    }
    optimizer = build_optimizer(*digits_model(**settings))
    for group in optimizer.param_groups:
        for name in ("lr", "momentum", "weight_decay", "damping"):
            assert group[name] == settings[name]
    interval = settings.pop("interval")
    for name in list(settings)[4:]:
        assert getattr(optimizer, name) == settings[name]
    for name in ("factor_interval", "eigen_interval", "scale_interval"):
        assert getattr(optimizer, name) == interval
    assert optimizer.lr_scale == "sgd"


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
    assert type(optimizer) is not building.DecoupledSGD
    assert torch.equal(*ends)


# the schedule


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0: 1, 3.5: 1, 8: 1}),
        ("cosine", {0: 1, 2: (1 + math.sqrt(0.5)) / 2, 4: 0.5, 6: (1 - math.sqrt(0.5)) / 2, 8: 0}),
        ("step", {0: 1, 3.99: 1, 4: 0.1, 5.99: 0.1, 6: 0.01, 8: 0.01}),
    ],
)
def test_the_schedule_at_known_epochs(schedule, expected):
    for epoch, factor in expected.items():
        assert learning_rate_factor(schedule, 8, epoch) == pytest.approx(factor, abs=1e-15)
