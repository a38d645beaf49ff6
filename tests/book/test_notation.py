"""If this fails, the notation page sends a reader to a name that the package does not have."""

import inspect
import re

import pytest
from chapter_rules import ROOT

from tekfac_edu import optim, reference

TEXT = (ROOT / "book" / "notation.md").read_text(encoding="utf-8")
ARGUMENTS = {"a", "g", "decay", "lr", "momentum"}
CODE = [row.split("|")[-2] for row in re.findall(r"^\|.*\|$", TEXT, re.M)]
NAMES = sorted(set(re.findall(r"(?<!})`(\w+)`", " ".join(CODE))) - ARGUMENTS)
IN_PYTORCH = TEXT.partition("## In PyTorch")[2].partition("\n## ")[0]
SHARED = ("lr", "damping", "momentum", "fisher", "interval", "decay")
OF_NUMPY = {"NaturalGradient", "basis"}  # named there to say what is otherwise
IN_TORCH = sorted(set(re.findall(r"(?<!})`(\w+)`", IN_PYTORCH)) - OF_NUMPY - set(SHARED))


def test_the_page_names_code():
    assert len(NAMES) >= 20


@pytest.mark.parametrize("name", NAMES)
def test_name_is_public(name):
    assert name in reference.__all__
    assert hasattr(reference, name)


@pytest.mark.parametrize("argument", sorted(ARGUMENTS - {"a", "g"}))
def test_argument_exists(argument):
    assert f"`{argument}`" in TEXT
    assert argument in inspect.signature(reference.NaturalGradient).parameters


@pytest.mark.parametrize("name", IN_TORCH)
def test_name_is_public_in_pytorch(name):
    assert name in optim.__all__
    assert hasattr(optim, name)


@pytest.mark.parametrize("argument", SHARED)
def test_optimizers_of_both_houses_take_the_argument(argument):
    assert f"`{argument}`" in IN_PYTORCH
    for optimizer in (reference.NaturalGradient, optim.TEKFAC):
        assert argument in inspect.signature(optimizer).parameters


def test_what_is_called_otherwise_in_pytorch():
    assert "lr_scale" in inspect.signature(reference.NaturalGradient).parameters
    assert "basis" in inspect.signature(reference.NaturalGradient).parameters
    assert optim.Cost(eigenbasis="qr").eigenbasis == "qr"


@pytest.mark.parametrize("name", ["KFAC", "EKFAC", "TKFAC", "TEKFAC"])
def test_methods_have_the_attribute_the_page_promises(name):
    assert "`.eigenvalues` of each method" in TEXT
    method = getattr(reference, name)
    fields = getattr(method, "__dataclass_fields__", {})
    assert "eigenvalues" in fields or isinstance(method.eigenvalues, property)


def test_layer_statistics_and_network_attributes():
    mlp = reference.MLP((2, 3), rng=0)
    assert [W.shape for W in mlp.weights] == [(3, 3)]
    assert set(reference.LayerStatistics.__dataclass_fields__) == {"a", "g"}


def test_every_fisher_of_the_page_is_accepted():
    choices = re.findall(r'^\| \w+.*\| `"(\w+)"` \|', TEXT, re.M)
    assert tuple(choices) == reference.networks.FISHERS
