"""How the book's figures look: one palette for the methods, one page width, one set of rcParams.

The palette shows the 2 × 2 table of methods. Blue are the factors of independence (KFAC, EKFAC),
orange the trace-restricted ones (TKFAC, TEKFAC); light, dashed and open is uncorrected, dark, solid
and filled is corrected. Hues, line styles and markers each tell the methods apart on their own.
"""

from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

WIDTH = 7.2
"""Width of every figure, in inches: at 120 dots per inch, a little more than a text column."""

INK, SOFT, FAINT = "#22252A", "#6B7079", "#E4E6EA"
"""Text and axes; secondary text; grid lines and borders."""

DIVERGING = LinearSegmentedColormap.from_list(
    "diverging", ["#7A1F0E", "#D4572A", "#F6B48F", "#FFFFFF", "#9CC8EC", "#2F7FC1", "#0B3A66"]
)
"""Heat maps: white at 0, orange-red below, blue above."""


@dataclass(frozen=True)
class MethodStyle:
    """How one method is drawn everywhere: a colour, a line style, a marker."""

    color: str
    linestyle: str | tuple
    marker: str
    filled: bool
    linewidth: float = 2.0

    def line(self):
        """Keyword arguments for `Axes.plot`."""
        return {
            "color": self.color,
            "linestyle": self.linestyle,
            "linewidth": self.linewidth,
            "marker": self.marker,
            "markersize": 5.5,
            "markerfacecolor": self.color if self.filled else "white",
            "markeredgecolor": self.color,
            "markeredgewidth": 1.3,
        }


DASHED = (0, (4.0, 1.6))

METHOD_STYLES = {
    "KFAC": MethodStyle("#4796DB", DASHED, "o", filled=False),
    "EKFAC": MethodStyle("#0B3F80", "-", "o", filled=True),
    "TKFAC": MethodStyle("#DE7D0C", DASHED, "s", filled=False),
    "TEKFAC": MethodStyle("#A8320A", "-", "s", filled=True),
    "exact": MethodStyle("#111111", "-", "D", filled=True, linewidth=2.6),
    "nearest Kronecker product": MethodStyle("#0F7F5E", (0, (6, 1.5, 1.2, 1.5)), "^", filled=True),
    "diagonal": MethodStyle("#9096A0", (0, (1.2, 1.4)), "v", filled=True),
    "SGD": MethodStyle("#4A4F58", (0, (6, 1.5, 1.2, 1.5, 1.2, 1.5)), "X", filled=True),
    "Adam": MethodStyle("#8A3FC4", (0, (8, 2)), "P", filled=True),
}


def method_style(method):
    """The style of a method by its name, e.g. ``ax.plot(x, y, **method_style("KFAC").line())``.

    Raises ValueError for a name that METHOD_STYLES does not have.
    """
    if method not in METHOD_STYLES:
        raise ValueError(f"method must be one of {', '.join(METHOD_STYLES)}; got {method!r}")
    return METHOD_STYLES[method]


RC_PARAMS = {
    "figure.dpi": 120,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "mathtext.fontset": "stix",
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": 9.5,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 2.8,
    "image.cmap": "viridis",
    "savefig.facecolor": "white",
    "savefig.dpi": "figure",
}


def use_book_style():
    """Set matplotlib's rcParams to the book's, starting from matplotlib's defaults.

    In a notebook also: a figure that a cell ends with is shown as one PNG of the figure's own
    size, not cropped to its contents, so that all figures of a page are equally wide.
    """
    _show_figures_uncropped()
    mpl.rcdefaults()
    mpl.rcParams.update(RC_PARAMS)


def subplots(nrows=1, ncols=1, *, height=2.9, **kwargs):
    """A figure of the page's width with its axes, laid out so that nothing overlaps.

    End the notebook cell with the figure to show it (once: pyplot does not know it).

    Parameters
    ----------
    nrows, ncols : ints >= 1.
    height : float > 0, inches; the width is 7.2 inches.
    **kwargs : as in `Figure.subplots` (sharex, sharey, width_ratios, squeeze, ...).

    Returns
    -------
    (Figure, Axes or array of Axes), as `pyplot.subplots`.
    """
    fig = page_figure(height)
    return fig, fig.subplots(nrows, ncols, **kwargs)


def page_figure(height):
    """An empty figure of the page's width; height in inches, > 0."""
    if not height > 0:
        raise ValueError(f"height must be > 0 inches, got {height!r}")
    return Figure(figsize=(WIDTH, height), layout="constrained")


def _show_figures_uncropped():
    try:
        from IPython import get_ipython
        from matplotlib_inline.backend_inline import set_matplotlib_formats
        from matplotlib_inline.config import InlineBackend
    except ImportError:
        return
    shell = get_ipython()
    if shell is not None:
        InlineBackend.instance(parent=shell).print_figure_kwargs = {"bbox_inches": None}
        set_matplotlib_formats("png")


def finite_matrix(name, values):
    """`values` as a float64 matrix; ValueError naming the argument if it is not a finite one."""
    values = np.asarray(values, float)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"{name} must be a non-empty matrix, got shape {values.shape}")
    if not np.isfinite(values).all():
        count = np.count_nonzero(~np.isfinite(values))
        raise ValueError(f"{name} must be finite, got {count} NaN or infinite of {values.size}")
    return values
