"""If this fails, a reader of the NumPy half has to install and load torch or matplotlib."""

import json
import subprocess
import sys

import pytest

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
