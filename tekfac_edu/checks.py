"""One function with which a cell asserts what the text above it claims.

    check("thm-trace", tekfac.trace(), np.trace(F))      # -> ✓ thm-trace  (rtol=1e-09)

What it prints on success never depends on the last bits of a result, so stored notebook outputs
compare equal on another machine.
"""

import numpy as np


def check(label, left, right=None, *, rtol=1e-9, atol=0.0):
    """Assert that two numbers or arrays agree, or that a condition holds; print one line.

    Agreement is ``max|left − right| <= rtol · max|right| + atol``: relative to the largest entry,
    so that an array of size 1e-30 is held to as many digits as one of size 1, and an entry that
    rounding keeps from being exactly zero does no harm beside large ones. Against zeros alone only
    exact zeros agree: give `atol`, in the units of the numbers compared.

    Parameters
    ----------
    label : str, the label of the theorem box (or a few words) that the line repeats.
    left, right : numbers or arrays of one shape, finite; `right` may be a number against an array.
        Without `right`, `left` is the condition, a single bool.
    rtol, atol : floats >= 0.

    Raises
    ------
    AssertionError
        If the claim does not hold, or a number is not finite. The message has the label and the
        largest deviation, in two digits.
    ValueError
        If nothing can be compared: no label, shapes differ, an array is empty or not numeric,
        a condition that is not one bool, a tolerance below 0.
    """
    if not isinstance(label, str) or not label.strip():
        raise ValueError(f"label must be a non-empty string, got {label!r}")
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        if not 0 <= tolerance < np.inf:
            raise ValueError(f"{name} must be a finite number >= 0, got {tolerance!r}")
    if right is None:
        _check_condition(label, left)
        return
    left, right = _numbers("left", left), _numbers("right", right)
    if right.ndim and left.shape != right.shape:
        raise ValueError(
            f"left and right must have one shape, got {left.shape} and {right.shape} in {label!r}"
        )
    for name, values in (("left", left), ("right", right)):
        if not np.isfinite(values).all():
            bad = np.count_nonzero(~np.isfinite(values))
            raise AssertionError(f"{label}: {name} has {bad} non-finite of {values.size} entries")
    size = np.abs(right).max()
    with np.errstate(over="ignore"):
        deviation = np.abs(left - right).max()
    if not deviation <= rtol * size + atol:
        raise AssertionError(
            f"{label}: largest deviation {deviation:.2g}, "
            f"where rtol={rtol:g} of the largest entry {size:.2g} and atol={atol:g} are allowed"
        )
    print(f"✓ {label}  (rtol={rtol:g}{f', atol={atol:g}' if atol else ''})")


def _check_condition(label, condition):
    if not isinstance(condition, (bool, np.bool_)):
        raise ValueError(
            f"left, without right, must be a single bool, got {type(condition).__name__} in "
            f"{label!r}; reduce an array with .all(), or give the right-hand side"
        )
    if not condition:
        raise AssertionError(f"{label}: the condition is False")
    print(f"✓ {label}")


def _numbers(name, values):
    try:
        array = np.asarray(values)
    except ValueError:
        raise ValueError(
            f"{name} must be a number or one array, got unequal shapes in a sequence; "
            "check its parts one by one"
        ) from None
    if array.dtype.kind not in "biufc":
        raise ValueError(f"{name} must be numeric, got an array of dtype {array.dtype}")
    if array.size == 0:
        raise ValueError(f"{name} is empty (shape {array.shape}): nothing would be checked")
    return array.astype(complex if array.dtype.kind == "c" else float)
