"""Everything that decides the numbers of one run, typed; the command line is generated from it."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from tekfac_edu.arguments import one_of, real_number, whole_number

MODELS = ("mlp", "autoencoder", "resnet20", "vgg16")
OPTIMIZERS = ("sgd", "adam", "kfac", "ekfac", "tkfac", "tekfac")
KRONECKER = OPTIMIZERS[2:]
DIGITS = ("digits", "mnist-5k", "mnist", "svhn")  # never mirrored
SIDES = {"digits": 8, "mnist-5k": 28, "mnist": 28, "fashion-mnist": 28}  # the others: 32


@dataclass(frozen=True)
class Configuration:
    """One run: what is trained, on what, by which optimizer, for how long."""

    model: Literal["mlp", "autoencoder", "resnet20", "vgg16"] = "resnet20"
    dataset: Literal[
        "digits", "mnist-5k", "mnist", "fashion-mnist", "cifar10", "cifar100", "svhn"
    ] = "cifar10"
    """digits, mnist-5k: embedded in packages; the others: downloaded, or see --data-folder."""
    optimizer: Literal["sgd", "adam", "kfac", "ekfac", "tkfac", "tekfac"] = "tekfac"
    lr: float = 0.1
    """Learning rate. The Kronecker optimizers multiply their direction by the damping, so that it
    means for all of them what it means for SGD."""
    damping: float = 1e-2
    """λ, added to the curvature; not used by sgd and adam."""
    weight_decay: float = 0.0
    """Decoupled, for every optimizer: θ ← θ − lr · weight_decay · θ."""
    momentum: float = 0.9
    """For adam: its β1."""
    epochs: int = 100
    batch_size: int = 128
    """Over all processes."""
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    """cosine: down to 0; step: a tenth at a half and again at three quarters of the epochs."""
    augment: bool = False
    """Random crops (margin 4) and, except of digits, flips."""
    width: int | None = None
    """Channels of the first stage; None: 16 for resnet20, 64 for vgg16."""
    widths: tuple[int, ...] | None = None
    """mlp and autoencoder: the layers' widths between the pixels and the classes, or the code."""
    interval: int = 10
    """Steps between refreshes of factors, eigenbases and eigenvalues alike."""
    warmup_steps: int = 20
    """So many steps at the beginning refresh everything."""
    factor_decay: float = 0.95
    scale_decay: float = 0.95
    damping_rule: Literal["paper", "added"] = "paper"
    damping_policy: Literal["constant", "trace"] = "constant"
    fisher: Literal["empirical", "mc", "exact"] = "empirical"
    eigenbasis: Literal["eigh", "qr"] = "eigh"
    input_rank: int | None = None
    """Eigenvectors kept on the side of a layer's inputs; None: all."""
    factor_rows: float | None = None
    """Factors from about so many examples times positions per input of a layer; None: from all."""
    scale_examples: int | None = None
    """Eigenvalues of ekfac and tekfac from so many examples of a batch; None: from all."""
    stagger: bool = False
    """Layers take turns over the interval, so that no step is slow."""
    precision: Literal["full", "bfloat16"] = "full"
    """Of the products that precondition a gradient."""
    held_out: bool = False
    """For tuning: a tenth of the training images takes the place of the test images."""
    train_images: int | None = None
    """Train with so many images only."""
    test_images: int | None = None
    bf16: bool = False
    """Forward pass under autocast to bfloat16."""
    seed: int = 0
    """Of the initial weights, the order, the crops and flips."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            choices = getattr(field.type, "__args__", ())
            if getattr(field.type, "__origin__", None) is Literal:
                one_of(field.name, getattr(self, field.name), choices)
        # NumPy's numbers become Python's: JSON and torch's safe loading know no others
        checked = {
            "lr": real_number("lr", self.lr, above=0),
            "damping": real_number("damping", self.damping, above=0),
            "weight_decay": real_number("weight_decay", self.weight_decay, at_least=0),
            "momentum": real_number("momentum", self.momentum, at_least=0, below=1),
        }
        for name in ("factor_decay", "scale_decay"):
            checked[name] = real_number(name, getattr(self, name), at_least=0, at_most=1)
        for name in ("epochs", "batch_size", "interval"):
            checked[name] = whole_number(name, getattr(self, name), 1)
        for name in ("warmup_steps", "seed"):
            checked[name] = whole_number(name, getattr(self, name), 0)
        if self.factor_rows is not None:
            checked["factor_rows"] = real_number("factor_rows", self.factor_rows, above=0)
        for name in ("width", "input_rank", "scale_examples", "train_images", "test_images"):
            if getattr(self, name) is not None:
                checked[name] = whole_number(name, getattr(self, name), 1)
        if self.widths is not None:
            checked["widths"] = tuple(whole_number("widths", width, 1) for width in self.widths)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        dense = self.model in ("mlp", "autoencoder")
        if dense and self.width is not None:
            raise ValueError(f"width is for resnet20 and vgg16; for {self.model} give widths")
        if not dense and self.widths is not None:
            raise ValueError(f"widths is for mlp and autoencoder; for {self.model} give width")
        if self.model == "vgg16" and self.dataset in SIDES:
            raise ValueError(
                f"vgg16 halves its images five times and needs 32×32 pixels; {self.dataset} has "
                f"{SIDES[self.dataset]}×{SIDES[self.dataset]}: use resnet20"
            )
        if self.model == "autoencoder" and self.augment:
            raise ValueError(
                "augment is for classification; the auto-encoder's target is its input"
            )

    @property
    def name(self):
        """Short, for people and folders: what differs within one race."""
        damping = f"-damping{self.damping:g}" if self.optimizer in KRONECKER else ""
        decay = f"-wd{self.weight_decay:g}" if self.weight_decay else ""
        return f"{self.optimizer}-lr{self.lr:g}{damping}{decay}-seed{self.seed}"

    def replace(self, **changes):
        """The same with changes, checked again."""
        return dataclasses.replace(self, **changes)

    def as_dict(self):
        """For records; `Configuration.from_dict` reads it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings):
        """From a record; ValueError for a setting that is unknown."""
        unknown = set(settings) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown settings in the configuration: {', '.join(sorted(unknown))}")
        if settings.get("widths") is not None:
            settings = settings | {"widths": tuple(settings["widths"])}
        return cls(**settings)
