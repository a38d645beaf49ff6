"""Everything that decides the numbers of one run, typed; the command line is generated from it."""

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args, get_origin

from tekfac_edu.arguments import one_of, real_number, whole_number
from tekfac_edu.data.images import DATASETS
from tekfac_edu.experiments.methods import KRONECKER, OPTIMIZERS
from tekfac_edu.experiments.migration import migrated_settings
from tekfac_edu.experiments.networks import NETWORKS, networks_with
from tekfac_edu.optim.settings import EXACT, Cost

if TYPE_CHECKING:  # tyro reads the names from the tables, which a type checker cannot
    Model: TypeAlias = str
    DataSet: TypeAlias = str
    Optimizer: TypeAlias = str
else:
    Model, DataSet = Literal[tuple(NETWORKS)], Literal[tuple(DATASETS)]
    Optimizer = Literal[OPTIMIZERS]

__all__ = ["KRONECKER", "OPTIMIZERS", "Configuration", "Cost"]


def _real(default, **bounds) -> Any:
    return field(default=default, metadata={"check": partial(real_number, **bounds)})


def _whole(default, at_least) -> Any:
    return field(default=default, metadata={"check": partial(whole_number, at_least=at_least)})


@dataclass(frozen=True)
class Configuration:
    """One run: what is trained, on what, by which optimizer, for how long."""

    model: Model = "resnet20"
    dataset: DataSet = "cifar10"
    """digits, mnist-5k: embedded in packages; the others: downloaded, or see --data-folder."""
    optimizer: Optimizer = "tekfac"
    lr: float = _real(0.1, above=0)
    """Learning rate: for the Kronecker optimizers that of flat directions, so that it means for all
    of them what it means for SGD."""
    damping: float = _real(1e-2, above=0)
    """λ, added to the curvature; not used by sgd and adam."""
    damping_rule: Literal["paper", "added", "by-trace"] = "paper"
    """paper: each method's own; added: D + λ for all; by-trace: TEKFAC's own for convolutions."""
    weight_decay: float = _real(0.0, at_least=0)
    """Decoupled, for every optimizer: θ ← θ − lr · weight_decay · θ."""
    momentum: float = _real(0.9, at_least=0, below=1)
    """Weight of the last step in the next; for adam its β1."""
    epochs: int = _whole(100, 1)
    """Passes over the training images."""
    batch_size: int = _whole(128, 1)
    """Over all processes."""
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    """cosine: down to 0; step: a tenth at a half and again at three quarters of the epochs."""
    augment: bool = False
    """Random crops (margin 4) and, except of digits, flips."""
    width: int | None = _whole(None, 1)
    """Channels of the first stage, for convolutional networks; None: as published."""
    widths: tuple[int, ...] | None = None
    """Of the layers between the pixels and the classes, or the code, for dense networks."""
    interval: int = _whole(10, 1)
    """Steps between refreshes of factors, eigenbases and eigenvalues alike."""
    warmup: int = _whole(20, 0)
    """So many steps at the beginning refresh everything."""
    decay: float = _real(0.95, at_least=0, at_most=1)
    """Weight of the old value in the averages of factors and eigenvalues."""
    trust: float | None = _real(None, above=0)
    """Bound on the predicted change of the model's outputs in one step (κ of the trust region);
    None: no bound."""
    positions: Literal["apart", "summed"] = "apart"
    """Of tkfac and tekfac: factors are sums over positions, or of examples' summed gradients."""
    fisher: Literal["empirical", "mc", "exact"] = "empirical"
    """Whose labels the curvature sees: the data's; the model's own, sampled, or in expectation."""
    cost: Cost = EXACT
    """What a refresh may cost: what is drawn, truncated, staggered and rounded."""
    held_out: bool = False
    """For tuning: a tenth of the training images takes the place of the test images."""
    train_images: int | None = _whole(None, 1)
    """Train with so many images only."""
    test_images: int | None = _whole(None, 1)
    """Test with so many images only."""
    bf16: bool = False
    """Forward pass under autocast to bfloat16."""
    seed: int = _whole(0, 0)
    """Of the initial weights, the order, the crops and flips."""

    def __post_init__(self):
        for setting in dataclasses.fields(self):
            name, value = setting.name, getattr(self, setting.name)
            if get_origin(setting.type) is Literal:
                one_of(name, value, get_args(setting.type))
            elif "check" in setting.metadata and not (value is None and setting.default is None):
                # NumPy's numbers become Python's: JSON and torch's safe loading know no others
                object.__setattr__(self, name, setting.metadata["check"](name, value))
        if self.widths is not None:
            widths = tuple(whole_number("widths", width, 1) for width in self.widths)
            object.__setattr__(self, "widths", widths)
        if not isinstance(self.cost, Cost):
            raise ValueError(f"cost must be a Cost; got {self.cost!r}")
        network, side = NETWORKS[self.model], DATASETS[self.dataset].side
        other = {"width": "widths", "widths": "width"}[network.sized_by]
        if getattr(self, other) is not None:
            raise ValueError(
                f"{other} is for {networks_with(other)}; for {self.model} give {network.sized_by}"
            )
        if network.side not in (None, side):
            raise ValueError(
                f"{self.model} needs images of {network.side}×{network.side} pixels; "
                f"{self.dataset} has {side}×{side}: use {networks_with(network.sized_by, side)}"
            )
        if self.augment and network.task.target == "image":
            raise ValueError(
                f"augment is for classification; the target of {self.model} is its input"
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
        """From a record of any format; ValueError for a setting that is unknown."""
        settings = migrated_settings(settings)
        cost = settings.get("cost", {})
        unknown = {*settings} - {field.name for field in dataclasses.fields(cls)}
        unknown |= {f"cost.{name}" for name in {*cost} - {f.name for f in dataclasses.fields(Cost)}}
        if unknown:
            raise ValueError(f"unknown settings in the configuration: {', '.join(sorted(unknown))}")
        if settings.get("widths") is not None:
            settings["widths"] = tuple(settings["widths"])
        return cls(**settings | {"cost": Cost(**cost)})
