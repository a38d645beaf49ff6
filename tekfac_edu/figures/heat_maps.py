"""Heat maps of matrices: a Fisher block, its approximations, and what lies between them."""

import numpy as np
from matplotlib.colors import CenteredNorm
from matplotlib.ticker import MaxNLocator

from tekfac_edu.figures.style import DIVERGING, INK, SOFT, WIDTH, finite_matrix, page_figure


def matrices(mats, titles, blocks=None, ncols=None, shared=True, percentile=100.0):
    """Heat maps of matrices on a colour scale whose white is 0.

    Parameters
    ----------
    mats : list of K (rows, columns) finite arrays.
    titles : list of K strings.
    blocks : None or sizes of the diagonal blocks, adding up to the rows (and columns) of every
        matrix: thin lines mark their borders.
    ncols : int >= 1, panels in a row; None puts all in one row.
    shared : bool. One colour scale for all, or one for each.
    percentile : in (0, 100]. The scale ends at this percentile of the absolute entries; what lies
        beyond is drawn in the end colour, and the colour bar says so.

    Returns
    -------
    Figure, 7.2 inches wide.

    Raises
    ------
    ValueError
        If the arguments do not fit each other, or an entry is not finite.
    """
    mats = [finite_matrix(f"mats[{k}]", M) for k, M in enumerate(mats)]
    _check_arguments(mats, titles, blocks, ncols, percentile)
    ncols = len(mats) if ncols is None else ncols
    nrows = -(-len(mats) // ncols)
    panel_width = min((WIDTH - 0.8) / ncols, 3.2)
    tallest = max(M.shape[0] / M.shape[1] for M in mats)
    fig = page_figure(nrows * (panel_width * tallest + 0.35))
    fig.set_layout_engine("compressed")
    axes = fig.subplots(nrows, ncols, squeeze=False).ravel()
    for ax in axes[len(mats) :]:
        ax.set_axis_off()
    axes = axes[: len(mats)]
    shared_limit = _limit(mats, percentile)
    for ax, M, title in zip(axes, mats, titles, strict=True):
        limit = shared_limit if shared else _limit([M], percentile)
        image = ax.imshow(M, cmap=DIVERGING, norm=CenteredNorm(0, limit))
        _frame(ax, title, blocks)
        if not shared:
            _color_bar(fig, image, ax, percentile, aspect=24)
    if shared:
        _color_bar(fig, image, list(axes), percentile, aspect=24 * nrows)
    return fig


def _check_arguments(mats, titles, blocks, ncols, percentile):
    if not mats:
        raise ValueError("mats must have at least one matrix, got none")
    if len(titles) != len(mats):
        raise ValueError(f"titles must have one entry per matrix, {len(mats)}; got {len(titles)}")
    if ncols is not None and (not isinstance(ncols, int) or ncols < 1):
        raise ValueError(f"ncols must be None or an int >= 1, got {ncols!r}")
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile must be in (0, 100], got {percentile!r}")
    for k, M in enumerate(mats if blocks is not None else ()):
        if {int(np.sum(blocks))} != set(M.shape):
            raise ValueError(
                f"blocks must add up to the rows and columns of every matrix; they add up to "
                f"{int(np.sum(blocks))}, and mats[{k}] has shape {M.shape}"
            )


def _frame(ax, title, blocks):
    ax.set_title(title)
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set(visible=True, color=SOFT, linewidth=0.6)
    for border in np.cumsum(blocks)[:-1] if blocks is not None else ():
        ax.axhline(border - 0.5, color=INK, linewidth=0.5)
        ax.axvline(border - 0.5, color=INK, linewidth=0.5)


def _limit(mats, percentile):
    entries = np.abs(np.concatenate([M.ravel() for M in mats]))
    return max(np.percentile(entries, percentile), np.finfo(float).tiny)


def _color_bar(fig, image, axes, percentile, aspect):
    extend = "both" if percentile < 100 else "neither"
    bar = fig.colorbar(image, ax=axes, extend=extend, shrink=0.9, aspect=aspect, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    bar.locator = MaxNLocator(4)
    if percentile < 100:
        bar.set_label(f"ends at percentile {percentile:g} of |entries|", size=8, color=SOFT)
