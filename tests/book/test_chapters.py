"""If this fails, a chapter shows a reader something that was not run, checked or explained."""

import nbformat
import pytest
from chapter_rules import CHAPTERS, RULES


def test_the_ladder_has_no_missing_rung():
    numbers = [int(path.name[:2]) for path in CHAPTERS]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) >= 8


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_keeps_every_rule(path):
    notebook = nbformat.read(path, as_version=4)
    complaints = [f"{rule.__name__}: {c}" for rule in RULES for c in rule(notebook)]
    assert not complaints, "\n".join([path.name, *complaints])
