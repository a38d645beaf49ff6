"""What a step costs: time and memory of every optimizer on one network, side by side, as ratios.

Optimizers take turns step by step in one process, so that whatever else the machine does hits all
alike. A refresh makes steps unequal: means are over whole intervals, and the worst step is told.
"""

import statistics
import time

import torch
from tabulate import tabulate

from tekfac_edu.arguments import whole_number
from tekfac_edu.data.images import Images
from tekfac_edu.experiments.building import build_model, build_optimizer
from tekfac_edu.experiments.configuration import OPTIMIZERS
from tekfac_edu.experiments.records import FORMAT, circumstances
from tekfac_edu.experiments.reporting import NAMES
from tekfac_edu.experiments.tasks import task_of


def measure_steps(configuration, images, device, optimizers=OPTIMIZERS, intervals=3):
    """Time whole intervals of every optimizer on one random batch of the data set's shape.

    Parameters
    ----------
    configuration : Configuration: model, batch size, interval and so on; its optimizer is ignored.
    images : Images, for their shape and number of classes.
    device : "cpu" or "cuda".
    optimizers : which of the six; SGD is measured in any case.
    intervals : how many whole intervals are timed, after one that is not.

    Returns
    -------
    dict: circumstances, configuration, and {optimizer: mean, median, worst step in seconds, all of
    them relative to SGD's mean, state_bytes, parameter_bytes, peak_bytes (CUDA only: weights,
    gradients and state, and what a step allocates beside them)}.
    """
    whole_number("intervals", intervals, 1)
    device = torch.device(device)
    names = ["sgd", *(name for name in optimizers if name != "sgd")]
    configuration = configuration.replace(warmup_steps=0)
    contestants = {name: _Contestant(configuration, name, images, device) for name in names}
    x, y = _batch(configuration, images, device)
    times = {name: [] for name in names}
    extra = dict.fromkeys(names, 0)
    for _ in range(configuration.interval):
        for step in contestants.values():
            step(x, y)
    for turn in range(intervals * configuration.interval):
        order = names if turn % 2 == 0 else names[::-1]
        for name in order:
            before = _allocated(device, reset=True)
            start = time.perf_counter()
            contestants[name](x, y)
            _wait(device)
            times[name].append(time.perf_counter() - start)
            extra[name] = max(extra[name], _allocated(device) - before)
    base = statistics.mean(times["sgd"])
    measured = {}
    for name, step in contestants.items():
        state = _bytes(step.optimizer.state_dict())
        weights = sum(p.numel() * p.element_size() for p in step.model.parameters())
        measured[name] = {
            "mean": statistics.mean(times[name]),
            "median": statistics.median(times[name]),
            "worst": max(times[name]),
            "mean_ratio": statistics.mean(times[name]) / base,
            "worst_ratio": max(times[name]) / base,
            "state_bytes": state,
            "parameter_bytes": weights,
            "peak_bytes": extra[name] + 2 * weights + state if device.type == "cuda" else None,
        }
    return {
        "format": FORMAT,
        **circumstances(device),
        "configuration": configuration.as_dict(),
        "intervals": intervals,
        "steps": measured,
    }


def steps_table(measured):
    """The result of `measure_steps` as text."""
    rows = [
        [
            NAMES[name],
            f"{1e3 * cost['mean']:.1f}",
            f"{cost['mean_ratio']:.2f}",
            f"{cost['worst_ratio']:.1f}",
            f"{cost['state_bytes'] / cost['parameter_bytes']:.1f}",
            *([] if cost["peak_bytes"] is None else [f"{cost['peak_bytes'] / 2**20:.0f}"]),
        ]
        for name, cost in measured["steps"].items()
    ]
    peak = [] if measured["steps"]["sgd"]["peak_bytes"] is None else ["peak MiB"]
    headers = ["", "ms a step", "ratio to SGD", "worst step", "state / parameters", *peak]
    return tabulate(rows, headers, disable_numparse=True)


def blank_images(shape, classes=10):
    """A data set of this shape (channels, height, width) with nothing in it, to measure steps."""
    x, y = torch.zeros((1, *shape), dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    return Images("blank", tuple(map(str, range(classes))), x, y, x, y)


class _Contestant:
    """One model with its optimizer; called with a batch, it takes a step."""

    def __init__(self, configuration, name, images, device):
        configuration = configuration.replace(optimizer=name)
        self.task = task_of(configuration)
        self.model = build_model(configuration, images).to(device)
        self.optimizer = build_optimizer(configuration, self.model)

    def __call__(self, x, y):
        self.optimizer.zero_grad()
        self.task.loss(self.model(x), x, y).backward()
        self.optimizer.step()


def _batch(configuration, images, device):
    draw = torch.Generator().manual_seed(0)
    shape = (configuration.batch_size, *images.x_train.shape[1:])
    x = torch.rand(shape, generator=draw)
    y = torch.randint(len(images.classes), (configuration.batch_size,), generator=draw)
    return x.to(device), y.to(device)


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _allocated(device, reset=False):
    """The most bytes in use since the last reset, or, at a reset, those now; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    _wait(device)
    if reset:
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return torch.cuda.max_memory_allocated(device)


def _bytes(state):
    """Of all tensors in a nested state."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    values = state.values() if isinstance(state, dict) else state
    return sum(map(_bytes, values)) if isinstance(state, dict | list | tuple) else 0
