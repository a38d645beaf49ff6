"""If this fails, the ways to install the project disagree: two readers would run two programs."""

import base64
import importlib.metadata
import json
import re
import subprocess
import tomllib

import pytest
import yaml
from chapter_rules import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
)


def requirements(extras):
    """The core requirements and those of the named extras, by name."""
    listed = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    parsed = [Requirement(line) for line in listed]
    return {canonicalize_name(r.name): r for r in parsed if r.name != PROJECT["name"]}


def environment():
    """environment.yml: (conda's requirements, lines for pip)."""
    listed = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    conda = [entry for entry in listed if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in listed if isinstance(entry, dict)]
    return conda, pip


def test_environment_installs_this_package_as_make_does():
    conda, pip = environment()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (installed,) = re.findall(r"(-c constraints.txt) (-e) '(\.\[book,test\])'", makefile)
    assert pip == [installed[0], " ".join(installed[1:])]
    assert [re.split(r"[<>=]", entry)[0] for entry in conda] == ["python", "pip"]


def test_python_is_the_same_everywhere():
    conda, _ = environment()
    (lower,) = re.findall(r"^python>=([\d.]+),", conda[0])
    assert PROJECT["requires-python"] == f">={lower}"
    assert f"sys.version_info < ({lower.replace('.', ', ')})" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("name", ["numpy", "torch", "jupyter", "matplotlib", "scipy", "nbval"])
def test_environment_reaches(name):
    _, pip = environment()
    (extras,) = re.findall(r"^-e \.\[(.*)\]$", pip[-1])
    assert name in requirements(extras.split(","))


@pytest.mark.parametrize("name", requirements(["book", "experiments", "test", "dev"]))
def test_pin_is_within_the_bounds(name):
    assert requirements(["book", "experiments", "test", "dev"])[name].specifier.contains(PINS[name])


def test_pins_name_no_platform():
    assert not [pin for pin in PINS.items() if "+" in pin[1] or pin[0].startswith("nvidia")]


@pytest.mark.parametrize("name", requirements(["book", "experiments", "test"]))
def test_installed_is_pinned(name):
    """Where this fails alone, outputs may differ because another release makes them."""
    assert importlib.metadata.version(name).split("+")[0] == PINS[name]


def test_citation_names_this_release():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]


def test_continuous_integration_runs_what_the_readme_says():
    script = ROOT / ".ci" / "run"
    lines = script.read_text(encoding="utf-8").splitlines()
    commands = [line for line in lines if line.startswith("make")]
    assert commands == ["make book", "make test"]
    assert script.stat().st_mode & 0o111
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(command in readme for command in commands)


def test_make_help_lists_every_target():
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("help", "book", "test", "check", "run", "clean"):
        assert re.search(rf"^  {target} +\S", listed.stdout, re.M)


def test_readme_shows_the_figure_of_chapter_8():
    notebook = json.loads((ROOT / "book" / "08_tekfac.ipynb").read_text(encoding="utf-8"))
    (drawn,) = [
        output["data"]["image/png"]
        for cell in notebook["cells"]
        if cell["metadata"].get("mystnb", {}).get("figure", {}).get("name") == "fig-08-signature"
        for output in cell["outputs"]
        if "image/png" in output.get("data", {})
    ]
    shown = ROOT / "book" / "_static" / "four_methods.png"
    assert shown.read_bytes() == base64.b64decode(drawn), (
        f"write the figure fig-08-signature of chapter 8 to {shown.relative_to(ROOT)}"
    )
    assert shown.relative_to(ROOT).as_posix() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readmes_map_is_the_tree():
    """Every module is named, and nothing that is not there."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (drawn,) = re.findall(r"^```\n(book/ .*?)^```", readme, re.M | re.S)
    named = set(re.findall(r"\w+\.py", drawn))
    modules = [path for path in (ROOT / "tekfac_edu").rglob("*.py") if path.name != "__init__.py"]
    assert named == {path.name for path in modules}
    folders = {path.parent.relative_to(ROOT).as_posix() + "/" for path in modules}
    assert {f"{folder.split('/')[-2]}/" for folder in folders} <= set(re.findall(r"\w+/", drawn))
