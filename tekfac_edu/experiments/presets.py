"""The races: what is trained, for how long, and where the search for settings starts.

    preset = PRESETS["cifar10-resnet20"]

A start is only where the tuning begins; settings found by it are in the folder of the race.
"""

from dataclasses import dataclass

from tekfac_edu.experiments.configuration import Configuration
from tekfac_edu.experiments.methods import KRONECKER, OPTIMIZERS


@dataclass(frozen=True)
class Preset:
    """A race.

    Attributes
    ----------
    about : one line for --help and tables.
    base : Configuration that all runs share, apart from optimizer, lr, damping, weight decay, seed.
    starts : {optimizer: {setting: value}}, the first trial of the tuning, and what `compare` uses
        where nothing was tuned.
    targets : training losses to which epochs and seconds are counted.
    tuning_epochs : of a trial; the schedule is as long.
    weight_decay : whether weight decay is tuned, too (images with augmentation), or stays 0.
    """

    about: str
    base: Configuration
    starts: dict
    targets: tuple
    tuning_epochs: int
    weight_decay: bool = False


def _starts(sgd, adam, lr, damping, weight_decay=0.0):
    starts = {"sgd": {"lr": sgd}, "adam": {"lr": adam}}
    starts |= {name: {"lr": lr, "damping": damping} for name in KRONECKER}
    return {name: starts[name] | {"weight_decay": weight_decay} for name in OPTIMIZERS}


def _images(model, dataset, epochs, **changes):
    return Configuration(model=model, dataset=dataset, epochs=epochs, augment=True, **changes)


PRESETS = {
    "digits-mlp": Preset(
        "64-64-64-10 on scikit-learn's digits: minutes on one core",
        Configuration("mlp", "digits", widths=(64, 64), epochs=20),
        _starts(0.3, 0.01, 0.3, 1e-2),
        (0.3, 0.1, 0.03, 0.01, 0.003),
        20,
    ),
    "mnist-5k-autoencoder": Preset(
        "the 8-layer auto-encoder on 4,000 MNIST digits",
        Configuration("autoencoder", "mnist-5k", epochs=10, interval=20, warmup=10, fisher="mc"),
        _starts(0.003, 0.001, 0.01, 0.1),
        (200.0, 150.0, 130.0, 120.0),
        5,
    ),
    "cifar10-mini": Preset(
        "ResNet20 of half width on 5,000 CIFAR-10 images (give them as --data-folder)",
        _images("resnet20", "cifar10", 8, width=8, interval=20, warmup=10),
        _starts(0.1, 0.01, 0.1, 1e-2),
        (1.8, 1.6, 1.5, 1.4),
        4,
    ),
    "fashion-mnist": Preset(
        "ResNet20 on Fashion-MNIST",
        _images("resnet20", "fashion-mnist", 20),
        _starts(0.1, 0.003, 0.1, 1e-2, 5e-4),
        (0.4, 0.3, 0.25, 0.2),
        5,
        True,
    ),
}
for _dataset in ("cifar10", "cifar100", "svhn"):
    for _model in ("resnet20", "vgg16"):
        PRESETS[f"{_dataset}-{_model}"] = Preset(
            f"the paper's race: {_model} on {_dataset}",
            _images(_model, _dataset, 60),
            _starts(0.1, 0.001, 0.1, 1e-2, 5e-4),
            (2.0, 1.0, 0.5, 0.2) if _dataset == "cifar100" else (0.8, 0.5, 0.3, 0.2, 0.1),
            15,
            True,
        )
