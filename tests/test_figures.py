"""If this fails, a figure of the book shows something else than its data, or cannot be read."""

import base64
import io
import itertools
import struct

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import FancyBboxPatch

from tekfac_edu import figures
from tekfac_edu.figures.curves import _spread

FOUR = ("KFAC", "EKFAC", "TKFAC", "TEKFAC")
WAY_ON = ("training", "convolutions", "PyTorch", "experiments")
PLACES = (None, "start", "exact", "kronecker", "damping", *FOUR, *WAY_ON)


@pytest.fixture(autouse=True)
def book_style():
    with plt.rc_context():
        figures.use_book_style()
        yield


def png(fig, dpi="figure"):
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def empty_axes():
    return figures.subplots()[1]


def drawn_texts(fig):
    for ax in fig.axes:
        texts = [*ax.texts, ax.title, ax._left_title, ax._right_title]
        if ax.axison:
            for axis in (ax.xaxis, ax.yaxis):
                low, high = sorted(axis.get_view_interval())
                texts.append(axis.label)
                texts += [
                    label
                    for where, label in zip(
                        axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True
                    )
                    if low <= where <= high
                ]
        if ax.get_legend():
            texts += [ax.get_legend().get_title(), *ax.get_legend().get_texts()]
        yield from (text for text in texts if text.get_text() and text.get_visible())


def boxes_of(fig):
    """Extents of a map's boxes, and of the tag "you are here" (its border alone is white)."""
    boxes = [p for p in fig.axes[0].patches if isinstance(p, FancyBboxPatch)]
    tags = [p for p in boxes if p.get_edgecolor() == to_rgba("white")]
    others = [p for p in boxes if p not in tags]
    return [p.get_window_extent() for p in others], [p.get_window_extent() for p in tags]


def random_matrices(count, size=20):
    rng = np.random.default_rng(1)
    return [rng.normal(size=(size, size)) for _ in range(count)]


def draw_ellipses():
    fig, ax = figures.subplots()
    figures.ellipse(ax, np.array([[2.0, 0.5], [0.5, 1.0]]), center=(1.0, 2.0), radius=0.3)
    return fig


def draw_spectra():
    fig, ax = figures.subplots()
    values = np.geomspace(1, 1e-6, 40)
    figures.spectra(ax, {"exact": values, "TEKFAC": values.reshape(5, 8) * 2})
    ax.legend()
    return fig


def draw_curves(band="range"):
    fig, ax = figures.subplots()
    runs = 1 + np.random.default_rng(0).random((5, 30))
    for k, method in enumerate(figures.METHOD_STYLES):
        figures.curves_with_bands(ax, np.arange(30), runs + 0.02 * k, method, band=band)
    figures.end_labels(ax)
    ax.set_xlabel(figures.band_note(5, band))
    return fig


def draw_triangle(leg_a=0.4, leg_b=0.3):
    fig, ax = figures.subplots()
    figures.right_triangle(ax, np.hypot(leg_a, leg_b), leg_a, leg_b)
    return fig


DRAWERS = {
    **{f"map-{here}": (lambda here=here: figures.method_map(here)) for here in PLACES},
    "matrices": lambda: figures.matrices(
        random_matrices(5), (*FOUR, "exact $F$"), blocks=[12, 8], ncols=3, percentile=99
    ),
    "matrices-own-scales": lambda: figures.matrices(random_matrices(2), ["a", "b"], shared=False),
    "ellipses": draw_ellipses,
    "spectra": draw_spectra,
    "curves": draw_curves,
    "curves-quartiles": lambda: draw_curves("quartiles"),
    "triangle": draw_triangle,
    "triangle-flat": lambda: draw_triangle(0.194, 0.063),
    "triangle-degenerate": lambda: draw_triangle(0.4, 0.0),
    "triangle-steep": lambda: draw_triangle(0.05, 0.4),
}


ONE_OF_A_KIND = {k: v for k, v in DRAWERS.items() if k.count("-") == 0 or k == "map-EKFAC"}


@pytest.mark.parametrize("draw", ONE_OF_A_KIND.values(), ids=ONE_OF_A_KIND)
def test_figure_has_the_page_width_and_the_same_bytes_every_time(draw):
    fig = draw()
    assert isinstance(fig, Figure)
    first = png(fig)
    assert struct.unpack(">I", first[16:20]) == (864,)
    assert png(draw()) == first
    assert plt.get_fignums() == []  # pyplot would show it a second time


@pytest.mark.parametrize("draw", DRAWERS.values(), ids=DRAWERS)
def test_texts_lie_inside_the_figure_and_do_not_overlap(draw):
    fig = draw()
    fig.draw_without_rendering()
    boxes = {}
    for k, text in enumerate(drawn_texts(fig)):
        box = text.get_window_extent()
        boxes[k, text.get_text()] = box
        assert box.x0 >= 0 and box.y0 >= 0, text
        assert box.x1 <= fig.bbox.width and box.y1 <= fig.bbox.height, text
        assert text.get_fontsize() >= 7.5
    assert len(boxes) > 5
    for (a, box_a), (b, box_b) in itertools.combinations(boxes.items(), 2):
        overlap_x = min(box_a.x1, box_b.x1) - max(box_a.x0, box_b.x0)
        overlap_y = min(box_a.y1, box_b.y1) - max(box_a.y0, box_b.y0)
        # Line boxes include ascenders and descenders that most texts lack: allow 3 of 20 pixels.
        assert min(overlap_x, overlap_y) <= 3, (a, b)


def test_map_marks_the_place_and_nothing_else():
    maps = {here: figures.method_map(here) for here in PLACES}
    assert len({png(fig, dpi=40) for fig in maps.values()}) == len(PLACES)
    for here, fig in maps.items():
        texts = [text.get_text() for text in fig.axes[0].texts]
        assert texts.count("you are here") == (here is not None)
        assert all(texts.count(method) == 1 for method in FOUR)


@pytest.mark.parametrize("stop", WAY_ON)
def test_way_on_is_drawn_below_the_same_map_and_only_there(stop):
    """A new chapter must not redraw the maps of the others."""
    plain, longer = (imread(io.BytesIO(png(figures.method_map(here)))) for here in (None, stop))
    np.testing.assert_array_equal(longer[: len(plain)], plain)
    assert len(longer) > len(plain)
    for here in PLACES:
        texts = " ".join(text.get_text() for text in figures.method_map(here).axes[0].texts)
        assert all((name in texts) == (here in WAY_ON) for name in (*WAY_ON, "the way on"))


@pytest.mark.parametrize("stop", WAY_ON)
def test_you_are_here_hangs_below_its_stop_and_touches_nothing(stop):
    fig = figures.method_map(stop)
    fig.draw_without_rendering()
    boxes, (tag,) = boxes_of(fig)
    assert not any(box.overlaps(tag) for box in boxes)
    above = [box for box in boxes if box.x0 < tag.x0 and tag.x1 < box.x1 and box.y0 > tag.y1]
    nearest = min(above, key=lambda box: box.y0)
    texts = {t.get_text(): t.get_window_extent() for t in fig.axes[0].texts}
    (marked,) = (text for text, extent in texts.items() if nearest.contains(*extent.min))
    assert stop in marked
    assert nearest.y0 - tag.y1 < 0.1 * fig.dpi
    below = [box.y1 for box in boxes if box.y1 < tag.y0 and box.x0 < tag.x1 and tag.x0 < box.x1]
    assert all(tag.y0 - y > nearest.y0 - tag.y1 for y in below)  # nobody takes it for another's


@pytest.mark.parametrize(("here", "stops"), [(None, 4), *((stop, 8) for stop in WAY_ON)])
def test_boxes_of_the_map_lie_apart_and_hold_one_text_or_two(here, stops):
    fig = figures.method_map(here)
    fig.draw_without_rendering()
    boxes, _ = boxes_of(fig)
    assert len(boxes) == stops + 4
    for a, b in itertools.combinations(boxes, 2):
        assert not a.overlaps(b)
    held = [0] * len(boxes)
    for text in fig.axes[0].texts:
        if text.get_text() == "you are here":
            continue
        extent = text.get_window_extent()
        for k, box in enumerate(boxes):
            inside = box.contains(*extent.min) and box.contains(*extent.max)
            assert inside or not box.overlaps(extent), text
            held[k] += inside
    assert sorted(held) == [1] * stops + [2] * 4


@pytest.mark.parametrize("method", FOUR)
def test_you_are_here_sits_on_the_cell_it_names(method):
    texts = {text.get_text(): text for text in figures.method_map(method).axes[0].texts}
    (x, y), (cell_x, cell_y) = (texts[t].get_position() for t in ("you are here", method))
    assert abs(x - cell_x) < 1.1 and 0 < y - cell_y < 0.4


def test_matrices_share_a_symmetric_scale_unless_told_otherwise():
    A, B = random_matrices(2)
    images = [ax.images[0] for ax in figures.matrices([A, 3 * B], ["a", "b"]).axes[:2]]
    largest = np.abs([A, 3 * B]).max()
    for image, M in zip(images, (A, 3 * B), strict=True):
        np.testing.assert_array_equal(image.get_array(), M)
        assert image.get_clim() == (-largest, largest)
    images = [ax.images[0] for ax in figures.matrices([A, B], ["a", "b"], shared=False).axes[:2]]
    assert [image.get_clim()[1] for image in images] == [np.abs(A).max(), np.abs(B).max()]


def test_matrices_say_where_the_scale_was_cut():
    (A,) = random_matrices(1)
    fig = figures.matrices([A], ["a"], percentile=90)
    assert fig.axes[0].images[0].get_clim()[1] == np.percentile(np.abs(A), 90)
    assert "percentile 90" in fig.axes[1].get_ylabel()
    assert figures.matrices([A], ["a"]).axes[1].get_ylabel() == ""


def test_block_borders_lie_between_the_blocks():
    (A,) = random_matrices(1)
    ax = figures.matrices([A], ["a"], blocks=[12, 5, 3]).axes[0]
    across = [line.get_ydata()[0] for line in ax.lines if line.get_ydata()[0] not in (0, 1)]
    assert across == [11.5, 16.5]


def test_ellipse_is_the_level_set():
    ax = empty_axes()
    F, center = np.array([[2.0, 0.7], [0.7, 0.4]]), np.array([1.0, -2.0])
    figures.ellipse(ax, F, center, radius=0.3, linestyle="--")
    points = ax.lines[0].get_xydata() - center
    np.testing.assert_allclose(0.5 * np.einsum("ni,ij,nj->n", points, F, points), 0.3, rtol=1e-12)
    assert ax.lines[0].get_linestyle() == "--"


def test_spectra_are_sorted_and_leave_through_the_bottom():
    ax = empty_axes()
    figures.spectra(ax, {"exact": np.array([1e-9, 0.0, 4.0, -1e-17, 1.0])}, floor=1e-6)
    values = ax.lines[0].get_ydata()
    assert values[:2].tolist() == [4.0, 1.0]
    assert (values[2:] < ax.get_ylim()[0]).all() and ax.get_ylim()[0] == pytest.approx(4e-6)


@pytest.mark.parametrize(("band", "low", "high"), [("range", 0, 4), ("quartiles", 1, 3)])
def test_band_and_line_are_order_statistics_over_the_seeds(band, low, high):
    ax = empty_axes()
    x, runs = np.arange(4.0), np.random.default_rng(3).random((5, 4))
    figures.curves_with_bands(ax, x, runs, "TKFAC", band=band)
    in_order = np.sort(runs, axis=0)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), in_order[2])
    (polygon,) = (c for c in ax.collections if isinstance(c, PolyCollection))
    corners = {tuple(corner) for corner in polygon.get_paths()[0].vertices.tolist()}
    expected = {*zip(x, in_order[low], strict=True), *zip(x, in_order[high], strict=True)}
    assert {(round(a, 12), round(b, 12)) for a, b in corners} == {
        (round(float(a), 12), round(float(b), 12)) for a, b in expected
    }


def test_labels_move_apart_as_little_as_needed():
    positions = np.array([0.5, 0.1, 0.52, 0.9])
    placed = _spread(positions, gap=0.1)
    np.testing.assert_allclose(placed, [0.46, 0.1, 0.56, 0.9], atol=1e-12)
    np.testing.assert_allclose(_spread(np.zeros(3), 0.2), [-0.2, 0.0, 0.2], atol=1e-12)


def test_end_labels_stand_in_the_order_of_the_curves():
    ax = draw_curves().axes[0]
    heights = [text.xy[1] for text in ax.texts]
    ends = [line.get_ydata()[-1] for line in ax.get_lines()]
    assert [text.get_text() for text in ax.texts] == list(figures.METHOD_STYLES)
    assert np.argsort(heights).tolist() == np.argsort(ends).tolist()


def test_triangle_is_to_scale_with_its_right_angle_at_the_corrected_method():
    ax = empty_axes()
    figures.right_triangle(ax, 5.0, 4.0, 3.0, labels=("F", "TKFAC", "TEKFAC"))
    assert ax.get_aspect() == 1.0
    at = {t.get_text(): np.array(t.xy) for t in ax.texts}
    F, uncorrected, corrected = at["$F$"], at["TKFAC"], at["TEKFAC"]
    lengths = [np.linalg.norm(d) for d in (F - uncorrected, F - corrected, uncorrected - corrected)]
    assert lengths == [5.0, 4.0, 3.0]
    for text, side in (
        ("5", F + uncorrected),
        ("4", F + corrected),
        ("3", uncorrected + corrected),
    ):
        np.testing.assert_array_equal(at[text], side / 2)


def draw(function, *args, **kwargs):
    return getattr(figures, function)(empty_axes(), *args, **kwargs)


I2, NAN2 = np.eye(2), np.array([[1.0, np.nan], [0.0, 1.0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: figures.method_map("SGD"), "here must be None or one of start, .*got 'SGD'"),
        (lambda: figures.method_style("kfac"), "method must be one of KFAC, .*got 'kfac'"),
        (lambda: figures.subplots(height=0), "height must be > 0 inches, got 0"),
        (lambda: figures.matrices([], []), "mats must have at least one"),
        (lambda: figures.matrices([I2, NAN2], ["a", "b"]), r"mats\[1\] must be finite, got 1 NaN"),
        (lambda: figures.matrices([np.ones(3)], ["a"]), r"mats\[0\] must be a .*shape \(3,\)"),
        (lambda: figures.matrices([I2], ["a", "b"]), "titles must have .* 1; got 2"),
        (
            lambda: figures.matrices([I2], ["a"], blocks=[1, 2]),
            r"blocks must .* to 3, and mats\[0\]",
        ),
        (
            lambda: figures.matrices([I2], ["a"], ncols=0),
            "ncols must be None or an int >= 1, got 0",
        ),
        (lambda: figures.matrices([I2], ["a"], percentile=0), "percentile must be in .*got 0"),
        (lambda: draw("ellipse", np.eye(3)), r"F must be a symmetric \(2, 2\).*\(3, 3\)"),
        (lambda: draw("ellipse", np.array([[1, 2], [0, 1]])), r"F must be a symmetric"),
        (lambda: draw("ellipse", np.ones((2, 2))), "F must be positive definite"),
        (
            lambda: draw("ellipse", I2, center=(1, 2, 3)),
            r"center must have shape \(2,\), got \(3,\)",
        ),
        (lambda: draw("ellipse", I2, radius=-1), "radius must be > 0, got -1"),
        (lambda: draw("spectra", {"exact": [1, np.inf]}), r"curves\['exact'\] must be finite"),
        (lambda: draw("spectra", {"exact": []}), r"curves\['exact'\] must be"),
        (lambda: draw("spectra", {"exact": [0.0, -1.0]}), "curves must have a positive eigenvalue"),
        (lambda: draw("spectra", {}), "curves must have at least one"),
        (lambda: draw("spectra", {"Fisher": [1]}), "got 'Fisher'"),
        (lambda: draw("spectra", {"exact": [1]}, floor=1), "floor must be between 0 and 1, got 1"),
        (
            lambda: draw("curves_with_bands", [0, 1], np.ones((5, 3)), "KFAC"),
            r"runs must be \(seeds, 2\) .*got \(5, 3\)",
        ),
        (
            lambda: draw("curves_with_bands", [0, 1], np.ones((5, 2)), "KFAC", band="std"),
            "band must be one of range, quartiles; got 'std'",
        ),
        (lambda: figures.band_note(5, "std"), "band must be one of range, quartiles; got 'std'"),
        (lambda: draw("end_labels"), "ax has no labelled lines"),
        (lambda: draw("right_triangle", 5, 4, 2), "must satisfy hypotenuse² = .*got 25 and 20"),
        (lambda: draw("right_triangle", 0, 0, 0), "hypotenuse, leg_a, leg_b must be > 0"),
        (lambda: draw("right_triangle", 5, 4, 3, ("F", "K", "E")), "method must be one of"),
    ],
)
def test_errors_name_the_argument_and_what_it_got(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_cell_that_ends_with_a_figure_shows_it_once_and_uncropped():
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    v4 = nbformat.v4
    setup = "from tekfac_edu.figures import subplots, use_book_style\nuse_book_style()"
    cell = "fig, ax = subplots(height=2.0)\nax.plot([0, 1])\nfig"
    notebook = v4.new_notebook(cells=[v4.new_code_cell(setup), v4.new_code_cell(cell)])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    assert notebook.cells[0].outputs == []
    (output,) = notebook.cells[1].outputs
    picture = base64.b64decode(output.data["image/png"])
    assert struct.unpack(">II", picture[16:24]) == (864, 240)
