"""If this fails, a record does not say what was run, or a run begins that cannot be right."""

import json
from typing import get_args, get_type_hints

import numpy as np
import pytest

from tekfac_edu.data.images import DATASETS
from tekfac_edu.experiments.configuration import KRONECKER, OPTIMIZERS, Configuration, Cost
from tekfac_edu.experiments.networks import NETWORKS


def test_the_types_allow_what_the_tables_name():
    types = get_type_hints(Configuration)
    tables = {"model": NETWORKS, "dataset": DATASETS, "optimizer": OPTIMIZERS}
    for name, table in tables.items():
        assert get_args(types[name]) == tuple(table)


@pytest.mark.parametrize(
    "configuration",
    [
        Configuration(),
        Configuration("mlp", "digits", widths=(8, 4), lr=1 / 3, bf16=True, seed=7),
        Configuration("vgg16", "svhn", width=8, train_images=100, held_out=True, fisher="exact"),
        Configuration("autoencoder", "mnist-5k", "adam", widths=(9,), fisher="mc"),
        Configuration(damping_rule="by-trace", decay=0.5, cost=Cost(2.5, 7, 5, "qr", True)),
    ],
)
def test_what_goes_through_a_record_comes_back(configuration):
    written = json.loads(json.dumps(configuration.as_dict()))
    assert Configuration.from_dict(written) == configuration
    assert hash(Configuration.from_dict(written)) == hash(configuration)


def test_settings_added_later_have_their_defaults_in_old_records():
    settings = Configuration(lr=0.5).as_dict()
    del settings["bf16"], settings["cost"]["stagger"]
    assert Configuration.from_dict(settings) == Configuration(lr=0.5)


def test_unknown_settings_of_a_record_are_named():
    settings = Configuration().as_dict() | {"nesterov": True, "eta": 1}
    settings["cost"]["dollars"] = 3
    with pytest.raises(ValueError, match=r"the configuration: cost\.dollars, eta, nesterov"):
        Configuration.from_dict(settings)


def test_numbers_of_numpy_become_pythons():
    """They could not be written into a record, at the end of a run; nor read from a checkpoint."""
    given = Configuration(
        "mlp",
        "digits",
        lr=np.float32(0.5),
        damping=np.float64(0.25),
        seed=np.int64(3),
        epochs=np.int32(2),
        train_images=np.int64(300),
        widths=[np.int64(8)],
    )
    expected = Configuration(
        "mlp", "digits", lr=0.5, damping=0.25, seed=3, epochs=2, train_images=300, widths=(8,)
    )
    assert json.dumps(given.as_dict()) == json.dumps(expected.as_dict())
    assert given == expected


def test_names_tell_apart_what_differs_within_a_race_and_a_tuning():
    runs = [
        Configuration(optimizer=optimizer, lr=lr, weight_decay=decay, seed=seed)
        for optimizer in OPTIMIZERS
        for lr in (0.1, 0.32, 0.18)
        for decay in (0.0, 5e-4)
        for seed in (0, 1)
    ]
    runs += [Configuration(optimizer=name, damping=0.1) for name in KRONECKER]
    assert len({run.name for run in runs}) == len(runs)
    assert Configuration(lr=0.32, weight_decay=5e-4).name == (
        "tekfac-lr0.32-damping0.01-wd0.0005-seed0"
    )
    assert Configuration(optimizer="sgd").name == "sgd-lr0.1-seed0"


def test_replace_checks_again():
    with pytest.raises(ValueError, match="lr must be a finite number and > 0; got -1"):
        Configuration().replace(lr=-1)
    assert Configuration().replace(lr=0.2) == Configuration(lr=0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "resnet18"}, "model must be one of 'mlp', .*; got 'resnet18'"),
        ({"dataset": "imagenet"}, "dataset must be one of .*; got 'imagenet'"),
        ({"optimizer": "lbfgs"}, "optimizer must be one of .*; got 'lbfgs'"),
        ({"schedule": "linear"}, "schedule must be one of .*; got 'linear'"),
        ({"fisher": "true"}, "fisher must be one of .*; got 'true'"),
        ({"damping_rule": "pi"}, "damping_rule must be one of"),
        ({"lr": 0}, "lr must be a finite number and > 0; got 0"),
        ({"lr": float("nan")}, "lr must be a finite number"),
        ({"lr": "0.1"}, "lr must be a finite number"),
        ({"damping": 0.0}, "damping must be a finite number and > 0"),
        ({"weight_decay": -1e-4}, "weight_decay must be a finite number and >= 0"),
        ({"momentum": 1.0}, "momentum must be a finite number and >= 0 and < 1; got 1.0"),
        ({"decay": 1.5}, "decay must be a finite number and >= 0 and <= 1"),
        ({"decay": -0.5}, "decay must be a finite number and >= 0 and <= 1"),
        ({"epochs": 0}, "epochs must be a whole number >= 1; got 0"),
        ({"epochs": 1.5}, "epochs must be a whole number"),
        ({"batch_size": True}, "batch_size must be a whole number >= 1; got True"),
        ({"interval": 0}, "interval must be a whole number >= 1"),
        ({"warmup": -1}, "warmup must be a whole number >= 0"),
        ({"seed": -1}, "seed must be a whole number >= 0; got -1"),
        ({"width": 0}, "width must be a whole number >= 1"),
        ({"interval": None}, "interval must be a whole number >= 1; got None"),
        ({"lr": None}, "lr must be a finite number and > 0; got None"),
        ({"cost": {"stagger": True}}, r"cost must be a Cost; got {'stagger': True}"),
        ({"cost": None}, "cost must be a Cost; got None"),
        ({"train_images": 0}, "train_images must be a whole number >= 1"),
        ({"test_images": 0}, "test_images must be a whole number >= 1"),
        ({"model": "mlp", "widths": (8, 0)}, "widths must be a whole number >= 1; got 0"),
        ({"model": "mlp", "width": 8}, "width is for resnet20 and vgg16; for mlp give widths"),
        ({"widths": (8,)}, "widths is for mlp and autoencoder; for resnet20 give width"),
        ({"model": "vgg16", "dataset": "digits"}, "vgg16 .* 32×32 pixels; digits has 8×8"),
        ({"model": "vgg16", "dataset": "mnist"}, "mnist has 28×28: use resnet20"),
        ({"model": "autoencoder", "augment": True}, "augment is for classification"),
    ],
)
def test_what_cannot_be_right_is_refused_with_its_name(settings, message):
    with pytest.raises(ValueError, match=message):
        Configuration(**settings)
