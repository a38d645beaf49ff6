"""What counts as a valid setting: a choice, a real or a whole number; else an error that says why.

Both houses, NumPy and PyTorch, ask here, so that the same mistake gets the same answer.
"""

import numpy as np


def one_of(name, value, choices):
    """value, if it is one of the choices; ValueError that lists them otherwise."""
    if value not in tuple(choices):
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}; got {value!r}")
    return value


def real_number(name, value, at_least=None, above=None, at_most=None, below=None):
    """value as a finite float within its bounds; ValueError otherwise, for text and bools too."""
    bounds = ((">=", at_least), (">", above), ("<=", at_most), ("<", below))
    wanted = " and ".join(
        ["a finite number", *(f"{sign} {bound}" for sign, bound in bounds if bound is not None)]
    )
    number = np.asarray(value)
    inside = (
        number.ndim == 0
        and number.dtype.kind in "iuf"
        and np.isfinite(number)
        and (at_least is None or number >= at_least)
        and (above is None or number > above)
        and (at_most is None or number <= at_most)
        and (below is None or number < below)
    )
    if not inside:
        raise ValueError(f"{name} must be {wanted}; got {value!r}")
    return float(number)


def whole_number(name, value, at_least):
    """value as an int >= at_least; ValueError otherwise (bools are not numbers)."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < at_least:
        raise ValueError(f"{name} must be a whole number >= {at_least}; got {value!r}")
    return int(value)
