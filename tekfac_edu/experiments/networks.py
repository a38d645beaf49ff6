"""The networks of the experiments, one row each: options, sizes and checks follow from this table.

A new one is a function in `tekfac_edu/models.py` and a row here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from tekfac_edu import models
from tekfac_edu.experiments.tasks import Classification, Reconstruction, Task

GREY, COLOUR = (1, 28, 28), (3, 32, 32)


@dataclass(frozen=True)
class Network:
    """A network, and what it is trained for.

    Attributes
    ----------
    build : (shape of an image, number of classes, size) -> nn.Module
    task : what is minimized.
    sized_by : the setting for its size: "width", the channels of its first stage, or "widths", of
        its layers between the pixels and the classes, or the code.
    size : of the network as published.
    image : (channels, height, width) of what its steps are measured on where there is no data set.
    side : of the images it is restricted to, in pixels; None: of any.
    """

    build: Callable
    task: Task
    sized_by: str
    size: int | tuple[int, ...]
    image: tuple[int, int, int]
    side: int | None = None


NETWORKS = {
    "mlp": Network(
        lambda shape, classes, widths: models.mlp((prod(shape), *widths, classes)),
        Classification(),
        "widths",
        (256, 128),
        GREY,
    ),
    "autoencoder": Network(
        lambda shape, classes, widths: models.autoencoder((prod(shape), *widths)),
        Reconstruction(),
        "widths",
        (1000, 500, 250, 30),
        GREY,
    ),
    "resnet20": Network(
        lambda shape, classes, width: models.resnet20(classes, shape[0], width),
        Classification(),
        "width",
        16,
        COLOUR,
    ),
    "vgg16": Network(
        lambda shape, classes, width: models.vgg16(classes, shape[0], width),
        Classification(),
        "width",
        64,
        COLOUR,
        side=32,
    ),
}


def networks_with(setting, side=None):
    """Those whose size is this setting, and that take images of this side, for people."""
    return " and ".join(
        name
        for name, network in NETWORKS.items()
        if network.sized_by == setting and (side is None or network.side in (None, side))
    )
