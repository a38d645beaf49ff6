"""The 2 × 2 map of the methods, drawn at the head of every chapter with "you are here"."""

from itertools import pairwise

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from tekfac_edu.figures.style import FAINT, INK, SOFT, WIDTH, method_style

HEIGHT = 2.95

# (left, bottom, width, height) in inches from the figure's lower left corner.
CELLS = {
    "KFAC": (1.92, 1.46, 2.05, 0.72),
    "EKFAC": (5.02, 1.46, 2.05, 0.72),
    "TKFAC": (1.92, 0.44, 2.05, 0.72),
    "TEKFAC": (5.02, 0.44, 2.05, 0.72),
}
FORMULAS = {
    "KFAC": r"$A \otimes G$",
    "EKFAC": r"$(Q_A \otimes Q_G)\,\mathrm{diag}(S^{*})\,(\cdot)^{\mathrm{T}}$",
    "TKFAC": r"$\delta\;\Phi \otimes \Psi$",
    "TEKFAC": r"$(Q_\Phi \otimes Q_\Psi)\,\mathrm{diag}(\Theta)\,(\cdot)^{\mathrm{T}}$",
}
WAY_HERE = {
    "start": (1.92, 2.62, 1.18, 0.24, "which metric?"),
    "exact": (3.42, 2.62, 1.50, 0.24, r"the exact Fisher $F$"),
    "kronecker": (5.24, 2.62, 1.83, 0.24, r"Kronecker algebra $\otimes$"),
}
STOPS = WAY_HERE | {
    "damping": (1.92, 0.06, 5.15, 0.22, "damping, running averages, the step: for all four"),
}
# Below the rest, in two rows, and drawn only in the chapters that have left the table.
WAY_ON = {
    "training": (1.92, -0.30, 2.18, 0.24, "training small networks fairly"),
    "convolutions": (4.42, -0.30, 2.65, 0.24, "convolutions: one weight, many positions"),
    "PyTorch": (1.92, -0.84, 2.18, 0.24, "from NumPy to PyTorch"),
    "experiments": (4.42, -0.84, 2.65, 0.24, "full CNN experiments"),
}
WAY_ON_HEIGHT = 1.1


def method_map(here=None):
    """Draw the map of the methods.

    Rows are the two kinds of factors, columns whose eigenvalues are taken; above the table is the
    way to it, below what all four share. The way on from there is drawn for those who are on it.

    Parameters
    ----------
    here : None, or the place to mark with "you are here": "start", "exact", "kronecker", "KFAC",
        "damping", "EKFAC", "TKFAC" or "TEKFAC"; on the way on, "training", "convolutions",
        "PyTorch" or "experiments".

    Returns
    -------
    Figure, 7.2 × 2.95 inches; with the way on 7.2 × 4.05 inches.

    Raises
    ------
    ValueError
        If `here` is none of these.
    """
    places = (*STOPS, *CELLS, *WAY_ON)
    if here is not None and here not in places:
        raise ValueError(f"here must be None or one of {', '.join(places)}; got {here!r}")
    stops, bottom = (STOPS | WAY_ON, -WAY_ON_HEIGHT) if here in WAY_ON else (STOPS, 0)
    fig = Figure(figsize=(WIDTH, HEIGHT - bottom))
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(bottom, HEIGHT))
    ax.axis("off")
    for stop in stops:
        _draw_stop(ax, stop, here == stop)
    _headings(ax)
    for method in CELLS:
        _draw_cell(ax, method, here == method)
    _arrows(ax)
    _way(ax, "the way here", WAY_HERE)
    if here in WAY_ON:
        _way(ax, "the way on", WAY_ON)
    return fig


def _draw_stop(ax, stop, marked):
    left, bottom, width, height, text = (STOPS | WAY_ON)[stop]
    _box(ax, (left, bottom, width, height), INK if marked else "white", INK if marked else FAINT)
    ax.text(
        left + width / 2,
        bottom + height / 2 - 0.005,
        text,
        ha="center",
        va="center_baseline",
        size=8,
        color="white" if marked else SOFT,
    )
    if marked:
        shift = 0.14 if stop in WAY_ON else 0.05  # clear of a text that fills its box
        _you_are_here(
            ax, left + width, bottom - shift if stop != "damping" else bottom + height + 0.04
        )


def _draw_cell(ax, method, marked):
    left, bottom, width, height = CELLS[method]
    color = method_style(method).color
    tint = tuple(1 - 0.2 * (1 - c) for c in to_rgb(color))
    _box(ax, CELLS[method], tint if marked else "white", color, method_style(method).linestyle)
    center = left + width / 2
    ax.text(center, bottom + 0.44, method, ha="center", weight="bold", size=11.5, color=color)
    ax.text(center, bottom + 0.17, FORMULAS[method], ha="center", size=9.5)
    if marked:
        _you_are_here(ax, left + width, bottom + height)


def _headings(ax):
    for method, text in (
        ("KFAC", "eigenvalues from the factors"),
        ("EKFAC", "eigenvalues measured"),
    ):
        left, bottom, width, height = CELLS[method]
        ax.text(left + width / 2, bottom + height + 0.15, text, ha="center", size=8.5, color=SOFT)
    for method, title, lines in (
        (
            "KFAC",
            "factors of independence",
            (
                r"$A = \mathrm{E}[\bar{a}\bar{a}^{\mathrm{T}}]$",
                r"$G = \mathrm{E}[g g^{\mathrm{T}}]$",
            ),
        ),
        (
            "TKFAC",
            "trace-restricted factors",
            (
                r"$\Phi = \mathrm{E}[\Vert g\Vert^2\, \bar{a}\bar{a}^{\mathrm{T}}]/\delta$",
                r"$\Psi = \mathrm{E}[\Vert \bar{a}\Vert^2\, g g^{\mathrm{T}}]/\delta$",
            ),
        ),
    ):
        bottom = CELLS[method][1]
        ax.text(0.1, bottom + 0.52, title, size=8.5, weight="bold")
        for k, line in enumerate(lines):
            ax.text(0.1, bottom + 0.27 - 0.23 * k, line, size=9.5)


def _arrows(ax):
    for method in ("KFAC", "TKFAC"):
        left, bottom, width, height = CELLS[method]
        y = bottom + height / 2
        _arrow(ax, (left + width + 0.08, y), (CELLS["EKFAC"][0] - 0.08, y))
        ax.text(left + width + 0.49, y + 0.08, "correct the\neigenvalues", ha="center", size=8)
    for method in ("KFAC", "EKFAC"):
        left, bottom, width, _ = CELLS[method]
        x = left + 0.15
        _arrow(ax, (x, bottom - 0.05), (x, CELLS["TKFAC"][1] + CELLS["TKFAC"][3] + 0.05))
        ax.text(x + 0.1, bottom - 0.15, "restrict the trace", va="center_baseline", size=7.5)


def _way(ax, name, stops):
    """Stops in rows: the name in front, arrows from each to the next and into a new row."""
    left, bottom, _, height, _ = next(iter(stops.values()))
    for stop, following in pairwise(stops.values()):
        end, middle = following[0] - 0.04, following[1] + height / 2
        start = stop[0] + stop[2] + 0.04 if following[1] == stop[1] else end - 0.24
        _arrow(ax, (start, middle), (end, middle), SOFT)
    ax.text(
        left - 0.12,
        bottom + height / 2,
        name,
        ha="right",
        va="center_baseline",
        size=8,
        color=SOFT,
    )


def _arrow(ax, start, end, color=INK):
    ax.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>,head_length=3.2,head_width=1.9",
            linewidth=1.2,
            color=color,
            shrinkA=0,
            shrinkB=0,
        )
    )


def _box(ax, rectangle, face, edge, linestyle="-"):
    left, bottom, width, height = rectangle
    ax.add_patch(
        FancyBboxPatch(
            (left, bottom),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.07",
            facecolor=face,
            edgecolor=edge,
            linestyle=linestyle,
            linewidth=1.6,
        )
    )


def _you_are_here(ax, right, top):
    _box(ax, (right - 0.88, top - 0.09, 0.84, 0.19), INK, "white")
    ax.text(
        right - 0.46,
        top,
        "you are here",
        ha="center",
        va="center_baseline",
        size=7.5,
        weight="bold",
        color="white",
    )
