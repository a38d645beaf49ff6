"""If this fails, a stored text or picture that the code does not make would be published unseen."""

import importlib.util
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import nbformat
import numpy as np
import pytest
from chapter_rules import ROOT, run_chapters
from nbformat.v4 import new_code_cell, new_notebook

CONFTEST = ROOT / "book" / "conftest.py"
_spec = importlib.util.spec_from_file_location("book_conftest", CONFTEST)
guard = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(guard)

SETUP = """import matplotlib.pyplot as plt
import numpy as np

def line(height, size=(7.2, 5)):
    fig, ax = plt.subplots(figsize=size, layout="constrained")
    ax.plot([0, 1], [height, height], linewidth=0.8)
    ax.set_ylim(0, 1)
    plt.show()

def heat(vmax):
    fig, ax = plt.subplots(figsize=(4, 3), layout="constrained")
    ax.imshow(np.outer(np.arange(9), np.arange(9)), vmax=vmax)
    plt.show()"""

# Cell by cell: what is run before its outputs are stored, and what stands there afterwards.
SOURCES = {
    "setup": (SETUP, SETUP),
    "good line": ("line(0.5)", "line(0.5)"),
    "good heat": ("heat(64)", "heat(64)"),
    "good text": ("print(1 + 1)", "print(1 + 1)"),
    "good mistake": ("[][1]", "[][1]"),
    "line moved": ("line(0.5)", "line(0.52)"),
    "colour scale changed": ("heat(64)", "heat(80)"),
    "picture swapped": ("line(0.2)", "line(0.8)"),
    "size changed": ("line(0.5)", "line(0.5, (7.2, 4))"),
    "picture lost": ("print(1)", "print(1)\nline(0.5)"),
    "text changed": ("print(1 + 1)", "print(1 + 2)"),
    "theorem broken": (
        'from tekfac_edu.checks import check\ncheck("thm", 1.0, 1.0)',
        'from tekfac_edu.checks import check\ncheck("thm", 1.0, 1.001)',
    ),
    "error changed": ("[][1]", "{}[1]"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Which cells of a chapter whose code changed after it ran pass, run as `make test` does."""
    folder = tmp_path_factory.mktemp("book")
    shutil.copy(CONFTEST, folder)
    notebook = new_notebook(cells=[new_code_cell(run) for run, _ in SOURCES.values()])
    for cell, name in zip(notebook.cells, SOURCES, strict=True):
        if name in ("good mistake", "error changed"):
            cell.metadata["tags"] = ["raises-exception"]
    run_chapters.execute(notebook, folder)
    for cell, (_, now) in zip(notebook.cells, SOURCES.values(), strict=True):
        cell.source = now
    nbformat.write(notebook, folder / "chapter.ipynb")
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["--nbval", "--nbval-current-env", f"--junitxml={report}", f"--rootdir={folder}"]
    command += ["-c", os.devnull, "chapter.ipynb"]
    environment = {key: value for key, value in os.environ.items() if "PYTEST" not in key}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert report.exists(), done.stdout + done.stderr
    cases = ElementTree.parse(report).iter("testcase")
    return dict(zip(SOURCES, [len(case) == 0 for case in cases], strict=True))


@pytest.mark.parametrize("cell", SOURCES)
def test_only_unchanged_cells_pass(outcomes, cell):
    assert outcomes[cell] == (cell == "setup" or cell.startswith("good"))


def page_with_line(row, length=620):
    """A white page with one thin black line."""
    page = np.ones((500, 720, 3))
    page[row, 50 : 50 + length] = 0
    return page


def test_short_line_that_moved_is_caught():
    old, new = page_with_line(100, length=60), page_with_line(110, length=60)
    assert np.sqrt(np.mean((old - new) ** 2)) < guard.MAX_RMS  # too little ink for the mean
    with pytest.raises(AssertionError, match="moved"):
        guard.compare([old], [new])


def test_marker_that_moved_is_caught():
    old, new = np.ones((2, 500, 720, 3))
    old[100:106, 100:106] = new[100:106, 130:136] = 0
    with pytest.raises(AssertionError, match="moved"):
        guard.compare([old], [new])


def test_last_bits_pass():
    """Another processor's rounding: colours off by a little, an edge snapped to the next pixel."""
    old = page_with_line(100, length=60)
    noise = np.random.default_rng(0).normal(0, 0.005, old.shape)
    guard.compare([old, old], [np.clip(old + noise, 0, 1), page_with_line(101, length=60)])


def test_missing_picture_is_caught():
    with pytest.raises(AssertionError, match="1 figures stored, 0 drawn"):
        guard.compare([page_with_line(1)], [])
