"""If this fails, a chapter shows a reader something that was not run, checked or explained."""

import nbformat
import pytest
from chapter_rules import CHAPTERS, RULES, number_of


def test_ladder_has_one_chapter_a_rung_and_all_of_the_first_eight():
    """Later chapters stand on these; among the later ones, some may be missing."""
    numbers = [number_of(path) for path in CHAPTERS]
    assert numbers == sorted(set(numbers))
    assert numbers[:8] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert numbers[-1] <= 13


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_keeps_every_rule(path):
    notebook = nbformat.read(path, as_version=4)
    complaints = [f"{rule.__name__}: {c}" for rule in RULES for c in rule(notebook)]
    assert not complaints, "\n".join([path.name, *complaints])
