"""If this fails, a program of benchmarks/ hangs on what may change any day, or cannot be begun."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks

ROOT = Path(benchmarks.__file__).parents[1]
PROGRAMS = sorted(Path(benchmarks.__file__).parent.glob("*.py"))


def private(source):
    """What a program takes from others that begins with an underscore, or patches."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [part for alias in node.names for part in alias.name.split(".")]
            names += (getattr(node, "module", None) or "").split(".")
        yield from (n for n in names if n.startswith("_") and not n.endswith("__"))
        yield from (n for n in names if n in ("mock", "monkeypatch"))


def test_what_is_private_is_seen():
    source = "from unittest import mock\nfrom a._b import c\nd._e()\nimport f._g\nh.__doc__"
    assert sorted(private(source)) == ["_b", "_e", "_g", "mock"]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_a_program_imports_nothing_private_and_can_be_imported(path):
    assert list(private(path.read_text(encoding="utf-8"))) == []
    importlib.import_module("benchmarks" if path.stem == "__init__" else f"benchmarks.{path.stem}")


def test_a_program_is_begun_as_the_readme_says():
    command = [sys.executable, "-m", "benchmarks.step_profile", "--help"]
    begun = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert begun.returncode == 0 and "Profile the four methods" in begun.stdout
