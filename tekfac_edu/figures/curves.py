"""Plots over a line of numbers: spectra, and curves over training with bands.

Each draws into the axes it is given and returns nothing, so that a cell reads
``fig, ax = subplots(); spectra(ax, ...); fig``.
"""

import numpy as np
from matplotlib.ticker import LogLocator
from scipy.optimize import isotonic_regression

from tekfac_edu.figures.style import finite_matrix, method_style

BANDS = {
    "range": ("min to max", (0.0, 1.0)),
    "quartiles": ("quartiles", (0.25, 0.75)),
}
"""What a band around the median shows: in words, and as quantiles over the runs."""


def spectra(ax, curves, floor=1e-10):
    """Sorted eigenvalues on logarithmic axes, largest first.

    Parameters
    ----------
    ax : Axes.
    curves : dict from a method's name to its eigenvalues, of any shape.
    floor : float in (0, 1). The axis ends at `floor` times the largest eigenvalue of all; a curve
        that leaves through the bottom has only smaller ones (or zeros) from there on.
    """
    if not 0 < floor < 1:
        raise ValueError(f"floor must be between 0 and 1, got {floor!r}")
    if not curves:
        raise ValueError("curves must have at least one entry, got none")
    sorted_values = {}
    for method, values in curves.items():
        method_style(method)
        values = np.sort(np.ravel(values))[::-1]
        if values.size == 0 or not np.isfinite(values).all():
            raise ValueError(f"curves[{method!r}] must be finite eigenvalues, got {values}")
        sorted_values[method] = values
    largest = max(values[0] for values in sorted_values.values())
    if largest <= 0:
        raise ValueError(f"curves must have a positive eigenvalue; the largest is {largest}")
    for method, values in sorted_values.items():
        ax.plot(
            np.arange(1, len(values) + 1),
            np.maximum(values, largest * floor * 1e-2),
            label=method,
            **method_style(method).line() | {"marker": ""},
        )
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="place in the order",
        ylabel="eigenvalue",
        xlim=(0.93, 1.08 * max(map(len, sorted_values.values()))),
        ylim=(largest * floor, largest * 2),
    )
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:.0f}")


def curves_with_bands(ax, x, runs, method, band="range", label=None):
    """The median of several runs as a line, and a band around it.

    Parameters
    ----------
    ax : Axes. Set its scales with ``ax.set(xscale="symlog", yscale="log")``.
    x : (K,) array, e.g. training steps.
    runs : (seeds, K) array, one run a row.
    method : str, the name of a method: gives colour, line style and marker.
    band : "range" (smallest to largest run) or "quartiles". Say which in the caption or with
        ``band_note``.
    label : str, for legend and `end_labels`; the method's name if None.
    """
    x, runs = np.asarray(x, float), finite_matrix("runs", runs)
    if runs.shape[1:] != x.shape:
        raise ValueError(
            f"runs must be (seeds, {len(x)}) for x of shape {x.shape}, got {runs.shape}"
        )
    _check_band(band)
    style = method_style(method)
    low, high = np.quantile(runs, BANDS[band][1], axis=0)
    ax.fill_between(x, low, high, color=style.color, alpha=0.2, linewidth=0)
    every = max(1, len(x) // 8)
    ax.plot(
        x,
        np.median(runs, axis=0),
        label=method if label is None else label,
        markevery=every,
        **style.line(),
    )


def band_note(seeds, band="range"):
    """The words that say what a line and its band are, for a legend's title."""
    _check_band(band)
    return f"median of {seeds} seeds, band: {BANDS[band][0]}"


def end_labels(ax, size=8.5):
    """Write each line's label at its right end, moved apart where two would touch: no legend.

    Call it last: it needs the axis limits. Lines without a label are left alone.
    """
    lines = [line for line in ax.get_lines() if not line.get_label().startswith("_")]
    if not lines:
        raise ValueError("ax has no labelled lines; draw them first")
    ax.figure.draw_without_rendering()
    ends = np.array([line.get_xydata()[-1] for line in lines])
    height = ax.transAxes.inverted().transform(ax.transData.transform(ends))[:, 1]
    gap = size * 1.25 / 72 / (ax.figure.get_size_inches()[1] * ax.get_position().height)
    for line, y in zip(lines, _spread(np.clip(height, 0, 1), gap), strict=True):
        ax.annotate(
            line.get_label(),
            (1, y),
            xytext=(7, 0),
            textcoords="offset points",
            xycoords="axes fraction",
            va="center",
            color=line.get_color(),
            size=size,
            weight="bold",
        )


def _check_band(band):
    if band not in BANDS:
        raise ValueError(f"band must be one of {', '.join(BANDS)}; got {band!r}")


def _spread(positions, gap):
    """The nearest positions (least squares) that keep the order and are at least `gap` apart."""
    order = np.argsort(positions, kind="stable")
    steps = gap * np.arange(len(positions))
    placed = np.empty(len(positions))
    placed[order] = isotonic_regression(positions[order] - steps).x + steps
    return placed
