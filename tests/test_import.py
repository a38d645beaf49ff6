"""If this fails, a reader of the NumPy half has to load torch, or the house has arrows upwards."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import tekfac_edu

HEAVY = {"torch", "matplotlib", "sklearn", "pandas", "IPython"}


def modules_after(statement):
    """The top-level modules that a fresh interpreter has loaded after a statement."""
    program = f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in json.loads(done.stdout)}


@pytest.mark.parametrize(
    "statement",
    [
        "import tekfac_edu",
        "import tekfac_edu.reference",
        "from tekfac_edu.reference import *",
        "from tekfac_edu.reference import MLP; MLP((2, 2)).layer_statistics([[1.0, 2.0]])",
    ],
)
def test_nothing_heavy_is_loaded(statement):
    loaded = modules_after(statement)
    assert "tekfac_edu" in loaded
    assert not loaded & HEAVY


def test_the_check_can_see_a_heavy_module():
    pytest.importorskip("matplotlib")
    assert "matplotlib" in modules_after("import matplotlib")


def test_the_reference_half_runs_where_every_heavy_module_is_missing():
    missing = f"sys.modules.update(dict.fromkeys({sorted(HEAVY)!r}))"
    with pytest.raises(subprocess.CalledProcessError):
        modules_after(f"{missing}\nimport torch")
    modules_after(f"{missing}\nfrom tekfac_edu.reference import *")


ABOVE = {  # package: what it may import of this project, besides itself
    "arguments": set(),
    "checks": set(),
    "models": {"arguments"},
    "figures": set(),
    "reference": {"arguments"},
    "optim": {"arguments"},
    "data": {"arguments"},
    "experiments": {"arguments", "data", "figures", "models", "optim"},
}


def imported(path):
    """Parts of the project that a file names in its imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            first, *rest = name.split(".")
            if first == "tekfac_edu" and rest:
                yield rest[0]


@pytest.mark.parametrize("part", ABOVE)
def test_arrows_run_one_way(part):
    place = Path(tekfac_edu.__file__).parent / part
    files = place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]
    found = {name for path in files for name in imported(path)}
    assert found <= ABOVE[part] | {part}
    assert found or not place.is_dir()  # it has read something


def test_every_part_has_its_place_in_the_order():
    parts = {path.stem for path in Path(tekfac_edu.__file__).parent.glob("[a-z]*")}
    assert parts - {"__pycache__"} == set(ABOVE)
