"""nbval compares a chapter's texts; this compares its pictures.

Two renderings of one figure agree, here, when no pixel differs from all its neighbours in the other
rendering. So the last bits of another processor pass, and a line that moved does not, however thin.
"""

import base64
import io

import numpy as np
import pytest
from matplotlib.image import imread
from scipy.ndimage import maximum_filter, minimum_filter

MAX_RMS = 0.02  # of the whole picture, colours from 0 to 1: a colour scale that changed is above it
MAX_COLOUR = 0.1  # beyond the neighbours' range: an edge that is smoothed otherwise stays below
MAX_STRAYS = 1e-4  # share of pixels beyond it: a single marker that moved is above it


def pictures(outputs):
    """The PNG outputs as (height, width, 3) arrays of colours from 0 to 1, on white."""
    for output in outputs:
        if png := output.get("data", {}).get("image/png"):
            rgba = imread(io.BytesIO(base64.b64decode(png)), format="png")
            opacity = rgba[..., 3:] if rgba.shape[2] == 4 else 1.0
            yield rgba[..., :3] * opacity + 1 - opacity


def strays(picture, other):
    """How many pixels of `picture` are no colour between those of their 3 x 3 places in `other`."""
    low, high = minimum_filter(other, (3, 3, 1)), maximum_filter(other, (3, 3, 1))
    return np.any((picture < low - MAX_COLOUR) | (picture > high + MAX_COLOUR), axis=2).sum()


def compare(stored, fresh):
    """Raise AssertionError unless the two lists of pictures show the same."""
    assert len(stored) == len(fresh), f"{len(stored)} figures stored, {len(fresh)} drawn"
    for old, new in zip(stored, fresh, strict=True):
        assert old.shape == new.shape, f"figure size {old.shape[:2]} stored, {new.shape[:2]} drawn"
        rms = np.sqrt(np.mean((old - new) ** 2))
        assert rms <= MAX_RMS, f"the figure differs from the stored one: RMS {rms:.3f}"
        moved = max(strays(old, new), strays(new, old))
        assert moved <= MAX_STRAYS * old[..., 0].size, f"{moved} pixels of the figure have moved"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    result = yield
    if type(item).__name__ == "IPyNbCell":
        compare(list(pictures(item.cell.outputs)), list(pictures(item.test_outputs)))
    return result
