"""Every setting of an optimizer that decides a number and is not a parameter group's own.

    interval, decay, warmup     when statistics are refreshed, and how they are averaged
    fisher, seed                whose vectors they are taken from
    damping                     a rule of `damping.py`
    cost                        what a refresh may cost

They are state: `state_dict` holds them, `load_state_dict` restores them.
"""

from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

from tekfac_edu.arguments import one_of, real_number, whole_number
from tekfac_edu.optim.damping import RULES, Paper, rule_from
from tekfac_edu.optim.schedule import STAGES

REPLACED = {  # arguments of the first edition, and what says the same now
    "damping_policy": 'damping=ByTrace(...) for "trace"',
    "damping_rule": 'damping=Added(...) for "added"',
    "trace_multiplier": "damping=ByTrace(..., multiplier=...)",
    "trace_floor": "damping=ByTrace(..., floor=...)",
    "factor_interval": "interval=(factors, bases, eigenvalues)",
    "eigen_interval": "interval=(factors, bases, eigenvalues)",
    "scale_interval": "interval=(factors, bases, eigenvalues)",
    "warmup_steps": "warmup=",
    "factor_decay": "decay=",
    "scale_decay": "decay=",
    "eigenbasis": "cost=Cost(eigenbasis=...)",
    "input_rank": "cost=Cost(input_rank=...)",
    "factor_rows": "cost=Cost(factor_rows=...)",
    "scale_examples": "cost=Cost(eigenvalue_examples=...)",
    "stagger": "cost=Cost(stagger=...)",
    "precision": "cost=Cost(precision=...)",
    "lr_scale": "lr, which is now as under lr_scale='sgd' (that of 'natural', divided by damping)",
    "lr_other": "param_groups=, a group with an lr of its own",
    "plain_sgd": "plain=",
    "generator": "torch.manual_seed(...) before the optimizer is built",
}


@dataclass(frozen=True)
class Cost:
    """What a refresh may cost: what is drawn, truncated, staggered and rounded.

    `Cost()` is exact: all examples, all positions, whole bases by `eigh`, all layers at once.

    Raises
    ------
    ValueError
        If one is out of its bounds.
    """

    factor_rows: float | None = None
    """Per number in a layer's input (d_in), from how many examples times positions its factors are
    estimated, at positions drawn anew each time; None: all there are. Not where positions are
    summed: there the examples are those of the eigenvalues."""
    eigenvalue_examples: int | None = None
    """From how many examples of the batch, drawn anew each time, the eigenvalues of EKFAC and
    TEKFAC are measured, and factors of summed positions taken; None: all."""
    input_rank: int | None = None
    """Of a layer with more inputs, the eigenvectors kept on their side, those of the largest
    eigenvalues; what the others have is spread evenly over them, so that tr F is kept. None: all.
    With "qr" no large matrix on that side is ever decomposed."""
    eigenbasis: Literal["eigh", "qr"] = "eigh"
    """With "qr" one warm-started QR iteration per refresh (EKFAC, TEKFAC)."""
    stagger: bool = False
    """Layers take turns: each is refreshed at its own steps of the interval, so that no step is
    slow. The first step, and those of the warm-up, refresh all layers."""
    precision: Literal["full", "bfloat16"] = "full"
    """Of the products that precondition a gradient, each step; "bfloat16" on hardware that
    multiplies it faster."""

    def __post_init__(self):
        if self.factor_rows is not None:
            rows = real_number("factor_rows", self.factor_rows, above=0)
            object.__setattr__(self, "factor_rows", rows)  # a state has no NumPy numbers
        for name in ("eigenvalue_examples", "input_rank"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, whole_number(name, getattr(self, name), 1))
        one_of("eigenbasis", self.eigenbasis, ("eigh", "qr"))
        if not isinstance(self.stagger, bool):
            raise ValueError(f"stagger must be True or False; got {self.stagger!r}")
        one_of("precision", self.precision, ("full", "bfloat16"))


EXACT = Cost()
LOW = Cost(
    factor_rows=2,
    eigenvalue_examples=32,
    input_rank=128,
    eigenbasis="qr",
    stagger=True,
    precision="bfloat16",
)
COSTS = {"exact": EXACT, "low": LOW}


@dataclass(frozen=True)
class Settings:
    """What the constructor was given, checked.

    Attributes
    ----------
    fisher : "empirical", "mc" or "exact".
    interval : steps between refreshes of factors, bases and eigenvalues (T_FIM, T_EIG, T_RE).
    decay : ρ, weight of the old value in the running averages, 0 to 1.
    warmup : at each of the first so many steps everything is refreshed.
    trust : κ of the trust region, or None.   positions : "summed" or "apart".
    damping : rule.   cost : Cost.
    seed : of the samples of fisher="mc".
    """

    fisher: str
    interval: tuple[int, int, int]
    decay: float
    warmup: int
    trust: float | None
    positions: str
    damping: Paper
    cost: Cost
    seed: int

    @classmethod
    def checked(
        cls, method, fisher, interval, decay, warmup, trust, positions, damping, cost, seed
    ):
        """From the constructor's arguments.

        method : KFAC, EKFAC, TKFAC or TEKFAC.

        Raises
        ------
        ValueError
            That names the argument, what it got, and what would be right.
        """
        one_of("fisher", fisher, ("empirical", "mc", "exact"))
        by_factors = "eigenvalues" not in method.stages()
        one_of("positions", positions, ("apart", "summed") if method.summed_factors else ("apart",))
        if isinstance(cost, str):
            cost = COSTS[one_of("cost", cost, COSTS)]
            cost = replace(cost, eigenbasis="eigh") if by_factors else cost
        if not isinstance(cost, Cost):
            raise ValueError(f'cost must be "exact", "low" or a Cost; got {cost!r}')
        if cost.eigenbasis == "qr" and by_factors:
            raise ValueError(
                'Cost(eigenbasis="qr") is for EKFAC and TEKFAC, which are exact about any basis; '
                'KFAC and TKFAC need the eigenvalues of their factors: "eigh"'
            )
        return cls(
            fisher,
            _triple(interval),
            real_number("decay", decay, at_least=0, at_most=1),
            whole_number("warmup", warmup, 0),
            None if trust is None else real_number("trust", trust, above=0),
            positions,
            rule_from(damping),
            cost,
            seed,
        )

    def as_dict(self):
        """Plain data, for `state_dict`."""
        rule = {"rule": type(self.damping).__name__, **asdict(self.damping)}
        return {**asdict(self), "damping": rule}

    @classmethod
    def from_dict(cls, method, plain):
        """What `as_dict` gave; ValueError if it is something else."""
        if not isinstance(plain, dict) or set(plain) != {field.name for field in fields(cls)}:
            raise ValueError(f"the state's settings are not those of this version: {plain!r}")
        try:
            rule = dict(plain["damping"])
            damping = RULES[rule.pop("rule")](**rule)
            cost = Cost(**plain["cost"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"the state's damping or cost cannot be read: {error}") from error
        return cls.checked(method, **{**plain, "damping": damping, "cost": cost})

    def __str__(self):
        return ", ".join(
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if field.name != "seed"
        )


def _triple(interval):
    """(factors, bases, eigenvalues) from one number or three."""
    three = interval if isinstance(interval, tuple | list) else (interval,) * len(STAGES)
    if len(three) != len(STAGES):
        raise ValueError(
            f"interval must be a whole number >= 1, or three: (factors, bases, eigenvalues); "
            f"got {interval!r}"
        )
    return tuple(whole_number("interval", steps, 1) for steps in three)


def refuse_replaced(arguments):
    """TypeError for arguments that there are not, with what replaces those that there were."""
    for name in arguments:
        if name in REPLACED:
            raise TypeError(f"{name} is now {REPLACED[name]}")
        raise TypeError(f"there is no argument {name!r}")
