"""If this fails, a speed that somebody reads off a record or a figure was not measured as told."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import speed

from tekfac_edu.experiments.configuration import OPTIMIZERS, Configuration
from tekfac_edu.experiments.reporting import NAMES

SMALL = Configuration("mlp", widths=(4,), batch_size=4, interval=2)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Of a tiny run of everything but the peers."""
    folder = tmp_path_factory.mktemp("speed")
    threads = torch.get_num_threads()
    path = folder / "speed.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["speed.py", "--smoke"])
        speed.main(peers=False, threads=1, smoke=True, record=path, figures=folder / "figures")
    torch.set_num_threads(threads)
    png = (folder / "figures" / "step_cost.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000
    return json.loads(path.read_text())


def test_the_record_says_how_it_was_made(record):
    assert record["device"].endswith("1 thread(s)") and record["versions"]["torch"]
    assert record["command"] == "python benchmarks/speed.py --smoke"
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
    one = speed.measure(SMALL, torch.device("cpu"), ("sgd",), peers, {}, 2, 2)
    assert list(one["optimizers"]) == ["SGD", "runs"]
    assert one["left_out"] == {
        "absent": "ModuleNotFoundError: No module named 'absent'",
        "falls": "RuntimeError: it fell",
        "diverging": "ArithmeticError: its weights are not finite any more",
    }
    assert capsys.readouterr().out.count("left out") == 3


def test_a_failure_of_ours_is_no_reason_to_go_on():
    with pytest.raises(TypeError, match="no_such_option"):
        speed.measure(SMALL, torch.device("cpu"), ("tekfac",), {}, {"no_such_option": 1}, 1, 2)


def test_the_options_reach_ours():
    images = speed.blank_images((1, 28, 28))
    options = {"eigenbasis": "qr", "eigen_interval": 4}
    steps, _ = speed.contestants_of(SMALL, images, torch.device("cpu"), ("tekfac",), {}, options)
    optimizer = steps["TEKFAC, options"].optimizer
    assert steps["TEKFAC"].optimizer.eigenbasis == "eigh"
    assert (optimizer.eigenbasis, optimizer.eigen_interval) == ("qr", 4)
    assert (optimizer.factor_interval, optimizer.warmup_steps) == (2, 0)
    assert optimizer.lr_scale == "sgd" and isinstance(steps["SGD"].optimizer, torch.optim.SGD)
