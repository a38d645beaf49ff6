"""What a refresh may cost, and every other setting of an optimizer that decides a number."""

from dataclasses import dataclass, fields, replace

from tekfac_edu.arguments import one_of, real_number, whole_number


@dataclass(frozen=True)
class Cost:
    """What a refresh may cost: what is drawn, truncated, staggered and rounded.

    `Cost()` is exact: all examples, all positions, whole bases by `eigh`, all layers at once.

    Attributes
    ----------
    factor_rows : per number in a layer's input (d_in), from how many examples times positions its
        factors are estimated, at positions drawn anew each time; None: all there are.
    eigenvalue_examples : from how many examples of the batch, drawn anew each time, the eigenvalues
        of EKFAC and TEKFAC are measured; None: all.
    input_rank : of a layer with more inputs, the eigenvectors kept on their side, those of the
        largest eigenvalues; what the others have is spread evenly over them, so that tr F is kept.
        None: all. With "qr" no large matrix on that side is ever decomposed.
    eigenbasis : "eigh", or "qr": one warm-started QR iteration per refresh (EKFAC, TEKFAC).
    stagger : layers take turns: each is refreshed at its own steps of the interval, so that no step
        is slow. The first step, and those of the warm-up, refresh all layers.
    precision : "full", or "bfloat16": of the products that precondition a gradient, each step, on
        hardware that multiplies it faster.
    """

    factor_rows: float | None = None
    eigenvalue_examples: int | None = None
    input_rank: int | None = None
    eigenbasis: str = "eigh"
    stagger: bool = False
    precision: str = "full"

    def __post_init__(self):
        if self.factor_rows is not None:
            real_number("factor_rows", self.factor_rows, above=0)
        for name in ("eigenvalue_examples", "input_rank"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), 1)
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
