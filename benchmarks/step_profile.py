"""Where the time of a step goes: seconds by phase, on one network, for the four methods.

    python -m benchmarks.step_profile                                  (minutes on one core)
    python -m benchmarks.step_profile --device cuda --model vgg16 --interval 50

torch's profiler is on: such a step is slower than one that nobody watches, so read the shares, and
take totals from `tekfac-edu bench`. The optimizer names its phases itself, as ranges of the
profiler; their time is the processor's, or on a GPU that of the kernels begun in them, so that what
is left for "other" is mostly the GPU's waiting for work.
The record is records/step_profile.json: device, versions, command, date, seconds per step.
"""

import time
from bisect import bisect
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import RECORDS
from tekfac_edu.arguments import one_of
from tekfac_edu.experiments.configuration import Configuration
from tekfac_edu.experiments.methods import KRONECKER
from tekfac_edu.experiments.networks import NETWORKS
from tekfac_edu.experiments.records import header, write_json
from tekfac_edu.experiments.step_cost import blank_images, contestant, random_batch

RECORD = RECORDS / "step_profile.json"
OURS = "tekfac_edu: "  # what the optimizer's ranges begin with
PHASES = {  # phase: its range; the phases of older records: tekfac_edu/experiments/migration.py
    "forward": "forward",
    "backward": "backward",
    "zero_grad": "zero_grad",
    "factors": OURS + "statistics of factors",
    "eigenbases": OURS + "eigenbases",
    "eigenvalues": OURS + "statistics of eigenvalues",
    "precondition": OURS + "precondition",
    "update": OURS + "update",
}


def profiled(step, x, y, steps):
    """Seconds of a step in each of PHASES, and in nothing of them ("other").

    Parameters
    ----------
    step : TrainingStep.   x, y : its batch, on the device of its model.
    steps : how many are watched; the result is their mean.

    Returns
    -------
    dict, phase -> seconds
    """
    on_gpu = x.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    if on_gpu:
        torch.cuda.synchronize(x.device)
    with profile(activities=activities) as watched:
        start = time.perf_counter()
        for _ in range(steps):
            with record_function("zero_grad"):
                step.optimizer.zero_grad()
            with record_function("forward"):
                loss = step.forward(x, y)
            with record_function("backward"):
                step.backward(loss)
            step.optimizer.step()
        if on_gpu:
            torch.cuda.synchronize(x.device)
        total = time.perf_counter() - start
    seconds = by_phase(watched.events(), on_gpu)
    seconds["other"] = total - sum(seconds.values())
    return {phase: value / steps for phase, value in seconds.items()}


def by_phase(events, on_gpu):
    """{phase: seconds} of a profile; a range inside another counts for itself alone."""
    phases = {name: phase for phase, name in PHASES.items()}
    events = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    turns = []  # (moment, 0 for an end and 1 for a beginning, the longest first, phase)
    for event in events:
        start, end = event.time_range.start, event.time_range.end
        if event.name in phases and start < end:
            turns += [(start, 1, -end, phases[event.name]), (end, 0, 0, "")]
    moments, innermost, inside = [], [], ["other"]
    for moment, begins, _, phase in sorted(turns):
        if begins:
            inside.append(phase)
        else:
            inside.pop()
        moments.append(moment)
        innermost.append(inside[-1])
    microseconds = dict.fromkeys([*PHASES, "other"], 0.0)
    if on_gpu:
        for event in events:
            place = bisect(moments, event.time_range.start)
            phase = innermost[place - 1] if place else "other"
            microseconds[phase] += sum(kernel.duration for kernel in event.kernels)
    else:
        for phase, (moment, following) in zip(innermost, pairwise(moments), strict=False):
            microseconds[phase] += following - moment
    return {phase: microseconds[phase] / 1e6 for phase in PHASES}


def profile_step(configuration, device, intervals=1):
    """Mean seconds of a step in each of PHASES, over whole intervals, after one that is not.

    Parameters
    ----------
    configuration : Configuration of one of the Kronecker optimizers; its warm-up is left out.
    device : "cpu" or "cuda".
    intervals : how many whole intervals are timed. A refresh costs `interval` times the mean of
        its phases.

    Returns
    -------
    dict, phase -> seconds
    """
    one_of("optimizer", configuration.optimizer, KRONECKER)
    configuration = configuration.replace(warmup=0)
    images = blank_images(NETWORKS[configuration.model].image)
    step = contestant(configuration, images, device)
    x, y = random_batch(configuration, images, torch.device(device))
    for _ in range(configuration.interval):  # a whole one, so that the next begins with a refresh
        step(x, y)
    return profiled(step, x, y, intervals * configuration.interval)


def main(
    model: Literal[tuple(NETWORKS)] = "resnet20",
    device: Literal["cpu", "cuda"] = "cpu",
    interval: int = 10,
    intervals: int = 1,
    batch_size: int = 128,
    width: int | None = None,
    record: Path = RECORD,
):
    """Profile the four methods.

    Args:
        model: convolutional ones on 32×32 in colour, dense ones on 28×28 pixels.
        device: cpu or cuda.
        interval: steps between refreshes.
        intervals: how many are timed, after one that is not.
        batch_size: examples in a step.
        width: channels of the first stage; default: the networks as published.
        record: where the record goes.
    """
    configuration = Configuration(
        model=model, interval=interval, batch_size=batch_size, width=width, warmup=0
    )
    profiles = {}
    for name in KRONECKER:
        profiles[name] = profile_step(configuration.replace(optimizer=name), device, intervals)
        total = sum(profiles[name].values())
        shares = ", ".join(f"{p} {s / total:.0%}" for p, s in profiles[name].items())
        print(f"{name:6} {1e3 * total:8.1f} ms a step: {shares}", flush=True)
    content = {
        **header(device),
        "configuration": configuration.as_dict(),
        "intervals": intervals,
        "seconds_per_step": profiles,
    }
    write_json(record, content)


if __name__ == "__main__":
    tyro.cli(main)
