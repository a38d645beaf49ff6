"""If this fails, the cost of a step is not what `tekfac-edu bench` says it is."""

import time

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tekfac_edu.experiments import step_cost
from tekfac_edu.experiments.configuration import Configuration
from tekfac_edu.experiments.methods import OPTIMIZERS

SMALL = Configuration("mlp", "digits", widths=(8,), batch_size=16, interval=3)
IMAGES = step_cost.blank_images((1, 8, 8))


@pytest.fixture(scope="module")
def measured():
    return step_cost.measure_steps(SMALL, IMAGES, "cpu", intervals=2)


def test_everything_is_measured_relative_to_sgd(measured):
    assert list(measured["steps"]) == list(OPTIMIZERS)
    sgd = measured["steps"]["sgd"]
    assert sgd["mean_ratio"] == 1.0
    for cost in measured["steps"].values():
        assert 0 < cost["median"] <= cost["worst"] and 0 < cost["mean"] <= cost["worst"]
        assert cost["mean_ratio"] == pytest.approx(cost["mean"] / sgd["mean"])
        assert cost["worst_ratio"] == pytest.approx(cost["worst"] / sgd["mean"])


def test_the_first_step_is_told_apart_and_not_counted(monkeypatch):
    ordinary, waits = torch.optim.AdamW.step, [0.2]

    def slow_at_first(self, closure=None):
        time.sleep(waits.pop() if waits else 0)
        return ordinary(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", slow_at_first)
    adam = step_cost.measure_steps(SMALL, IMAGES, "cpu", ["adam"], intervals=1)["steps"]["adam"]
    assert adam["worst"] < 0.2 <= adam["first"]


def test_memory_by_hand(measured):
    parameters = 65 * 8 + 9 * 10
    bytes_of = {name: cost["state_bytes"] for name, cost in measured["steps"].items()}
    assert measured["steps"]["sgd"]["parameter_bytes"] == 4 * parameters
    assert bytes_of["sgd"] == 4 * parameters  # momentum
    assert 2 * 4 * parameters <= bytes_of["adam"] <= 2 * 4 * parameters + 64  # and step counts
    # momentum, two factors, two bases, and D, of each layer
    squares = 65**2 + 8**2 + 9**2 + 10**2
    assert bytes_of["ekfac"] >= 4 * (2 * parameters + 2 * squares)
    assert bytes_of["ekfac"] <= 1.1 * 4 * (2 * parameters + 2 * squares)
    assert all(cost["peak_bytes"] is None for cost in measured["steps"].values())


def test_a_step_that_sleeps_is_seen_to(monkeypatch):
    ordinary = torch.optim.AdamW.step

    def slow(self, closure=None):
        time.sleep(0.02)
        return ordinary(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", slow)
    measured = step_cost.measure_steps(SMALL, IMAGES, "cpu", ["adam"], intervals=1)
    assert measured["steps"]["adam"]["median"] >= 0.02
    assert measured["steps"]["sgd"]["median"] < 0.02
    assert list(measured["steps"]) == ["sgd", "adam"]


def test_refreshes_fall_into_every_interval():
    """By torch's own profile: one interval that is not timed, and two that are."""
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        step_cost.measure_steps(SMALL, IMAGES, "cpu", ["kfac"], intervals=2)
    events = [(e.name, e.time_range.start, e.time_range.end) for e in watched.events()]
    decomposed = [start for name, start, _ in events if name == "aten::linalg_eigh"]
    steps = sorted((start, end) for name, start, end in events if name.endswith("#KFAC.step"))
    refreshes = [
        number
        for number, (start, end) in enumerate(steps)
        if any(start <= moment < end for moment in decomposed)
    ]
    assert len(steps) == 9 and refreshes == [0, 3, 6]


def test_the_table_names_every_optimizer(measured):
    table = step_cost.steps_table(measured)
    assert [line.split()[0] for line in table.splitlines()[2:]] == [
        "SGD",
        "Adam",
        "KFAC",
        "EKFAC",
        "TKFAC",
        "TEKFAC",
    ]
    assert "peak" not in table


@pytest.mark.gpu
def test_memory_on_a_gpu_covers_state_and_weights():
    measured = step_cost.measure_steps(SMALL, IMAGES, "cuda", intervals=1)
    for cost in measured["steps"].values():
        assert cost["peak_bytes"] >= cost["state_bytes"] + cost["parameter_bytes"]
