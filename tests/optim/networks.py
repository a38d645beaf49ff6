"""Small networks, one for every way in which a covered layer can be used, and batches for them."""

import warnings
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

CLASSES = 3


def double_precision(make):
    """Whatever make builds, in float64, from weights that depend on nothing but this line."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().double()


def gaussian(*shape, seed=0):
    """Normal numbers in float64 that depend on nothing but the seed."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def orthogonal(*shape, seed=0):
    """Orthogonal matrices (..., d, d)."""
    return torch.linalg.qr(gaussian(*shape, shape[-1], seed=seed))[0]


class OneLayer(nn.Module):
    """`layer`, tanh, and a linear head over everything that comes out."""

    def __init__(self, layer, outputs, activation=None, freeze=()):
        super().__init__()
        self.layer = layer()
        self.activation = activation or nn.Tanh()
        self.head = nn.Linear(outputs, CLASSES)
        for name in freeze:
            getattr(self.layer, name).requires_grad_(False)

    def forward(self, x):
        return self.head(self.activation(self.layer(x)).flatten(1))


class InTheMiddle(nn.Module):
    """A layer whose input depends on another covered layer."""

    def __init__(self, first, layer, outputs):
        super().__init__()
        self.first, self.layer = first(), layer()
        self.head = nn.Linear(outputs, CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(torch.tanh(self.first(x)))).flatten(1))


class Twice(nn.Module):
    """One layer called on its own output: further positions, whose gradients arrive in reverse."""

    def __init__(self, layer, outputs):
        super().__init__()
        self.layer, self.head = layer(), nn.Linear(outputs, CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))).flatten(1))


class OnSequenceAndSummary(nn.Module):
    """One layer on three positions and then on their mean: calls with unequal positions."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)).mean(1))))


class TwoSizesOfPicture(nn.Module):
    """One convolution on a picture and on its half: calls with unequal positions."""

    def __init__(self, layer, channels):
        super().__init__()
        self.layer, self.head = layer(), nn.Linear(2 * channels, CLASSES)

    def forward(self, x):
        small = nn.functional.avg_pool2d(x, 2)
        both = [torch.tanh(self.layer(picture)).mean((2, 3)) for picture in (x, small)]
        return self.head(torch.cat(both, 1))


class TwoCalls(nn.Module):
    """A whole network called twice in one loss, on the two halves of x."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 5), nn.Linear(5, CLASSES)

    def once(self, x):
        return self.head(torch.tanh(self.layer(x)))

    def forward(self, x):
        return self.once(x[:, :4]) - 0.5 * self.once(x[:, 4:]) ** 2


@dataclass(frozen=True)
class Case:
    """A network by name; `shape` is one example's, `layers` the covered modules to look at."""

    name: str
    network: object
    shape: tuple
    layers: tuple = ("layer", "head")

    def make(self):
        return double_precision(self.network)

    def batch(self, N=7, seed=1):
        """x and labels; the size of x is uneven from example to example, so traces are too."""
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn(N, *self.shape, generator=draw, dtype=torch.float64)
        size = torch.randn(N, generator=draw, dtype=torch.float64).mul(0.7).exp()
        labels = torch.randint(CLASSES, (N,), generator=draw)
        return x * size.reshape(-1, *[1] * len(self.shape)), labels


def one_layer(name, shape, kind, *sizes, activation=None, freeze=(), **options):
    layer = partial(kind, *sizes, **options)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel")  # a copy is made
        outputs = layer()(torch.zeros(1, *shape)).numel()
    network = partial(OneLayer, layer, outputs, activation=activation, freeze=freeze)
    return Case(name, network, shape)


def conv2d(name, kernel=3, picture=(5, 4), channels=(2, 3), **options):
    shape = (channels[0], *picture)
    return one_layer(f"Conv2d, {name}", shape, nn.Conv2d, *channels, kernel, **options)


def conv1d(name, kernel=3, channels=(2, 3), **options):
    return one_layer(f"Conv1d, {name}", (channels[0], 8), nn.Conv1d, *channels, kernel, **options)


CASES = [
    one_layer("Linear", (4,), nn.Linear, 4, 5),
    one_layer("Linear, no bias", (4,), nn.Linear, 4, 5, bias=False),
    one_layer("Linear, positions", (3, 4), nn.Linear, 4, 2),
    one_layer("Linear, no bias, positions", (3, 4), nn.Linear, 4, 2, bias=False),
    one_layer("Linear, two axes of positions", (2, 3, 4), nn.Linear, 4, 2),
    one_layer("Linear, in-place ReLU after it", (4,), nn.Linear, 4, 6, activation=nn.ReLU(True)),
    one_layer("Linear, frozen bias", (4,), nn.Linear, 4, 5, freeze=["bias"]),
    conv1d("plain"),
    conv1d("no bias", bias=False),
    conv1d("strided, dilated, padded", stride=2, dilation=2, padding=1),
    conv1d("same, even kernel", kernel=4, padding="same"),
    conv1d("circular", padding=2, padding_mode="circular"),
    conv2d("plain"),
    conv2d("no bias", bias=False),
    conv2d("kernel 1", kernel=1),
    conv2d("rectangular kernel", kernel=(2, 3)),
    conv2d("strided", stride=2, picture=(6, 5)),
    conv2d("dilated", dilation=2, picture=(6, 5)),
    conv2d("padding 1", padding=1),
    conv2d("padding (0, 2)", padding=(0, 2)),
    conv2d("valid", padding="valid"),
    conv2d("same", padding="same"),
    conv2d("same, even kernel", kernel=(2, 4), padding="same"),
    conv2d("same, dilated", kernel=(2, 3), dilation=(1, 2), padding="same"),
    conv2d("reflect", padding=(1, 2), padding_mode="reflect"),
    conv2d("replicate", padding=(2, 1), padding_mode="replicate"),
    conv2d("circular", padding=(1, 2), padding_mode="circular"),
    conv2d("circular, same, even kernel", kernel=2, padding="same", padding_mode="circular"),
    conv2d(
        "everything differs by axis",
        kernel=(3, 2),
        stride=(2, 1),
        padding=(1, 2),
        dilation=(1, 2),
        picture=(6, 4),
    ),
    conv2d("in-place ReLU after it", activation=nn.ReLU(True)),
    conv2d("frozen bias", freeze=["bias"]),
    conv1d("depthwise", channels=(2, 2), groups=2),
    conv1d(
        "two groups, strided, dilated, padded",
        channels=(4, 6),
        groups=2,
        stride=2,
        dilation=2,
        padding=1,
    ),
    conv2d("two groups", channels=(4, 6), groups=2),
    conv2d("two groups, no bias", channels=(4, 4), groups=2, bias=False),
    conv2d("two groups, frozen bias", channels=(4, 4), groups=2, freeze=["bias"]),
    conv2d("two groups, one position", (1, 2), (1, 2), (4, 6), groups=2),
    conv2d(
        "two groups, everything differs by axis",
        kernel=(3, 2),
        channels=(4, 6),
        groups=2,
        stride=(2, 1),
        padding=(1, 2),
        dilation=(1, 2),
        picture=(6, 4),
    ),
    conv2d("two groups, four positions, six outputs", (3, 4), (4, 5), (2, 12), groups=2),
    conv2d("depthwise", channels=(3, 3), groups=3),
    conv2d("depthwise, kernel 1", kernel=1, channels=(3, 3), groups=3),
    conv2d(
        "depthwise with a multiplier, same, even kernel",
        kernel=(2, 4),
        channels=(2, 6),
        groups=2,
        padding="same",
    ),
    Case(
        "Linear in the middle",
        partial(InTheMiddle, partial(nn.Linear, 4, 5), partial(nn.Linear, 5, 4), 4),
        (4,),
        ("first", "layer", "head"),
    ),
    Case(
        "Conv2d in the middle",
        partial(
            InTheMiddle, partial(nn.Conv2d, 2, 2, 3), partial(nn.Conv2d, 2, 3, 2, padding=1), 36
        ),
        (2, 5, 4),
        ("first", "layer", "head"),
    ),
    Case(
        "Conv2d, depthwise and pointwise",
        partial(
            InTheMiddle,
            partial(nn.Conv2d, 3, 6, 3, groups=3, padding=1),
            partial(nn.Conv2d, 6, 2, 1),
            40,
        ),
        (3, 5, 4),
        ("first", "layer", "head"),
    ),
    Case("Linear, used twice", partial(Twice, partial(nn.Linear, 4, 4), 4), (4,)),
    Case(
        "Conv2d, two groups, used twice",
        partial(Twice, partial(nn.Conv2d, 4, 4, 3, groups=2, padding=1), 64),
        (4, 4, 4),
    ),
    Case("Linear, used on a sequence and on its mean", OnSequenceAndSummary, (3, 4)),
    Case(
        "Conv2d, used on two sizes of picture",
        partial(TwoSizesOfPicture, partial(nn.Conv2d, 2, 3, 3), 3),
        (2, 8, 6),
    ),
    Case(
        "Conv2d, two groups, used on two sizes of picture",
        partial(TwoSizesOfPicture, partial(nn.Conv2d, 4, 4, 3, groups=2), 4),
        (4, 8, 6),
    ),
    Case("two calls of the network in one loss", TwoCalls, (8,)),
]


def chosen(*names):
    """The cases of these names."""
    by_name = {case.name: case for case in CASES}
    return [by_name[name] for name in names]


def mlp(activation=nn.Tanh):
    """4-5-3, for runs of several steps: every factor gets full rank from a dozen examples."""
    return double_precision(
        lambda: nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, CLASSES))
    )


def cnn():
    """Two convolutions with batch norm, a dense layer: pictures (1, 6, 6)."""
    return double_precision(
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3, bias=False),
            nn.BatchNorm2d(2),
            nn.Tanh(),
            nn.Conv2d(2, 3, 2, stride=2),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(3, CLASSES),
        )
    )


def separable():
    """Convolutions in groups, with a multiplier and pointwise, a dense layer: (4, 5, 5)."""
    return double_precision(
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 3, groups=2),
            nn.Tanh(),
            nn.Conv2d(4, 8, 2, groups=4, bias=False),
            nn.Tanh(),
            nn.Conv2d(8, 3, 1),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(3, CLASSES),
        )
    )


NETWORKS = {  # and the shape of one example
    "dense": (mlp, (4,)),
    "convolutions": (cnn, (1, 6, 6)),
    "groups": (separable, (4, 5, 5)),
}


def batches(shape, steps, N=12, seed=3):
    """A stream whose scale drifts, so that an old statistic is not like a new one."""
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        x = torch.randn(N, *shape, generator=draw, dtype=torch.float64)
        yield (1 + 0.3 * step) * x, torch.randint(CLASSES, (N,), generator=draw)
