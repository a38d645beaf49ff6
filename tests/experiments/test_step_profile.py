"""If this fails, the time of a step is charged to another phase than the one that took it."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import record_function

from benchmarks.step_profile import PHASES, by_phase, profile_step, profiled
from tekfac_edu.experiments.configuration import Configuration

PARTS = ("forward", "backward", "zero_grad", "factors", "eigenbases", "eigenvalues")
PARTS += ("precondition", "update", "other")


def event(name, start, end, kernels=(), device=DeviceType.CPU):
    kernels = [SimpleNamespace(duration=duration) for duration in kernels]
    times = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, time_range=times, kernels=kernels, device_type=device)


def named(phase, start, end):
    return event(PHASES[phase], start, end)


NESTED = [
    named("forward", 0, 10),
    named("update", 20, 60),
    named("precondition", 20, 30),  # inside, at its beginning
    named("precondition", 50, 60),  # and at its end
    named("factors", 60, 67),
    event("something else", 5, 65),
]


def test_a_range_inside_another_counts_for_itself_alone():
    seconds = by_phase(NESTED, False)
    expected = {"forward": 10, "update": 20, "precondition": 20, "factors": 7}
    assert seconds == {phase: expected.get(phase, 0) / 1e6 for phase in PHASES}


def test_on_a_gpu_the_time_is_that_of_the_kernels_begun_in_a_range():
    """By any thread: a backward pass has its own. The GPU's own copies of ranges do not count."""
    launched = [
        event("mm", 5, 6, [100, 10]),
        event("mm", 25, 26, [1000]),
        event("mm", 40, 41, [2000]),
        event("mm", 15, 16, [50_000]),  # in no range
        event("mm", -3, -2, [70_000]),
        event(PHASES["factors"], 0, 90, device=DeviceType.CUDA),
    ]
    seconds = by_phase(NESTED + launched, True)
    expected = {"forward": 110, "precondition": 1000, "update": 2000}
    assert seconds == {phase: expected.get(phase, 0) / 1e6 for phase in PHASES}


class Sleeper:
    """A training step whose phases take as many hundredths of a second as its places say."""

    def __init__(self):
        self.optimizer = self

    def zero_grad(self):
        time.sleep(0.01)

    def forward(self, x, y):
        time.sleep(0.03)

    def backward(self, loss):
        time.sleep(0.02)

    def step(self):
        for number, phase in enumerate(("factors", "eigenbases", "eigenvalues"), 4):
            with record_function(PHASES[phase]):
                time.sleep(number / 100)
        with record_function(PHASES["update"]):
            with record_function(PHASES["precondition"]):
                time.sleep(0.07)
            time.sleep(0.08)
        time.sleep(0.09)


def test_every_phase_has_the_time_it_took():
    seconds = profiled(Sleeper(), torch.zeros(1), torch.zeros(1), 2)
    assert tuple(seconds) == PARTS
    slept = dict(zip(PARTS, (0.03, 0.02, 0.01, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09), strict=True))
    for phase, least in slept.items():
        assert least <= seconds[phase] < least + 0.05 + 0.2 * (phase == "other"), phase


SMALL = Configuration("mlp", "digits", widths=(8,), batch_size=16, interval=3)


@pytest.mark.parametrize("name", ["kfac", "tekfac"])
def test_a_real_step_has_its_parts_in_its_phases(name):
    seconds = profile_step(SMALL.replace(optimizer=name), "cpu")
    assert tuple(seconds) == PARTS
    found = {phase for phase, value in seconds.items() if value > 0}
    assert found == set(PARTS) - ({"eigenvalues"} if name == "kfac" else set())


def test_what_has_no_factors_has_no_such_profile():
    with pytest.raises(ValueError, match=r"optimizer must be one of 'kfac', .*; got 'sgd'"):
        profile_step(SMALL.replace(optimizer="sgd"), "cpu")
