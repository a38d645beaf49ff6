"""The book's figures: every one 7.2 inches wide, in one palette, the same bytes on every run.

In a notebook: ``use_book_style()`` once at the top, then end a cell with the figure.
Needs matplotlib (``pip install tekfac-edu[book]``).
"""

from tekfac_edu.figures.curves import (
    band_note,
    curves_with_bands,
    end_labels,
    spectra,
)
from tekfac_edu.figures.geometry import ellipse, right_triangle
from tekfac_edu.figures.heat_maps import matrices
from tekfac_edu.figures.method_map import method_map
from tekfac_edu.figures.style import (
    METHOD_STYLES,
    method_style,
    page_figure,
    subplots,
    use_book_style,
)

__all__ = [
    "METHOD_STYLES",
    "band_note",
    "curves_with_bands",
    "ellipse",
    "end_labels",
    "matrices",
    "method_map",
    "method_style",
    "page_figure",
    "right_triangle",
    "spectra",
    "subplots",
    "use_book_style",
]
