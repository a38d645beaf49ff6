"""If this fails, a speed that somebody reads off a record or a figure was not measured as told."""

import dataclasses
import json
import re
import sys

import pytest
import torch

from benchmarks import speed
from tekfac_edu.experiments import building, step_cost
from tekfac_edu.experiments.configuration import Configuration, Cost
from tekfac_edu.experiments.methods import METHODS, OPTIMIZERS
from tekfac_edu.experiments.reporting import NAMES

SMALL = Configuration("mlp", widths=(4,), batch_size=4, interval=2)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Of a tiny run of everything but the peers."""
    folder = tmp_path_factory.mktemp("speed")
    threads = torch.get_num_threads()
    path = folder / "speed.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [speed.__file__, "--smoke"])
        speed.main(peers=False, threads=1, smoke=True, record=path, figures=folder / "figures")
    torch.set_num_threads(threads)
    png = (folder / "figures" / "step_cost.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000
    return json.loads(path.read_text())


def test_the_record_says_how_it_was_made(record):
    assert record["device"].endswith("1 thread(s)") and record["versions"]["torch"]
    assert record["command"] == "python -m benchmarks.speed --smoke"
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", record["date"])
    assert record["left_out"] == [] and record["peers"] == {}


def test_every_optimizer_is_measured_relative_to_sgd(record):
    assert [one["configuration"]["model"] for one in record["steps"]] == ["mlp", "resnet20"]
    for one in record["steps"]:
        assert list(one["optimizers"]) == [NAMES[name] for name in OPTIMIZERS]
        for cost in one["optimizers"].values():
            for key in speed.MEASURED:
                assert 0 < cost[key]["low"] <= cost[key]["median"] <= cost[key]["high"]
            assert cost["mean"]["median"] <= cost["worst"]["median"]
            assert cost["state_bytes"] >= cost["parameter_bytes"]
        sgd = one["optimizers"]["SGD"]
        assert sgd["mean_ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
        assert sgd["state_bytes"] == sgd["parameter_bytes"]


def test_a_peer_that_fails_is_left_out_with_its_reason(capsys):
    def absent(model, interval):
        raise ModuleNotFoundError("No module named 'absent'")

    class Falls(torch.optim.SGD):
        def step(self):
            raise RuntimeError("it fell")

    def diverging(model, interval):
        return torch.optim.SGD(model.parameters(), float("inf"))

    peers = {
        "absent": absent,
        "falls": lambda model, interval: Falls(model.parameters(), 0.1),
        "diverging": diverging,
        "runs": lambda model, interval: torch.optim.Adagrad(model.parameters()),
    }
    one = speed.measure(SMALL, torch.device("cpu"), ("sgd",), peers, Cost(), 2, 2)
    assert list(one["optimizers"]) == ["SGD", "runs"]
    assert one["left_out"] == {
        "absent": "ModuleNotFoundError: No module named 'absent'",
        "falls": "RuntimeError: it fell",
        "diverging": "ArithmeticError: its weights are not finite any more",
    }
    assert capsys.readouterr().out.count("left out") == 3


def test_a_failure_of_ours_is_no_reason_to_go_on(monkeypatch):
    def broken(*_, **__):
        raise TypeError("no such setting")

    monkeypatch.setitem(METHODS, "tekfac", dataclasses.replace(METHODS["tekfac"], make=broken))
    with pytest.raises(TypeError, match="no such setting"):
        speed.measure(SMALL, torch.device("cpu"), ("tekfac",), {}, Cost(), 1, 2)


def test_the_cost_reaches_ours_as_far_as_they_take_it(monkeypatch):
    """KFAC needs the eigenvalues of its factors: "eigh" in any case."""
    built, build = [], building.build_optimizer

    def noted(configuration, model):
        built.append((configuration.optimizer, configuration.cost))
        assert (configuration.interval, configuration.lr) == (2, SMALL.lr)
        return build(configuration, model)

    monkeypatch.setattr(step_cost, "build_optimizer", noted)
    images, cost = speed.blank_images((1, 28, 28)), Cost(eigenbasis="qr", input_rank=3)
    names = ("kfac", "tekfac")
    steps, _ = speed.contestants(SMALL, images, torch.device("cpu"), names, {}, cost)
    assert list(steps) == ["SGD", "KFAC", "KFAC, options", "TEKFAC", "TEKFAC, options"]
    assert built == [
        ("sgd", Cost()),
        ("kfac", Cost()),
        ("kfac", Cost(input_rank=3)),
        ("tekfac", Cost()),
        ("tekfac", cost),
    ]
    assert isinstance(steps["SGD"].optimizer, torch.optim.SGD)
