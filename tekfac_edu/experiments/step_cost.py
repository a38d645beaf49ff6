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
from tekfac_edu.experiments.methods import OPTIMIZERS
from tekfac_edu.experiments.networks import NETWORKS
from tekfac_edu.experiments.records import header
from tekfac_edu.experiments.reporting import NAMES


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
    dict: header, configuration, and {optimizer: mean, median and worst step in seconds; the
    very first, which is not among them; mean and worst relative to SGD's mean; state_bytes,
    parameter_bytes, peak_bytes (CUDA only: weights, gradients and state, and what a step allocates
    beside them)}.
    """
    whole_number("intervals", intervals, 1)
    device = torch.device(device)
    names = ["sgd", *(name for name in optimizers if name != "sgd")]
    configuration = configuration.replace(warmup=0)
    contestants = {
        name: contestant(configuration.replace(optimizer=name), images, device) for name in names
    }
    x, y = random_batch(configuration, images, device)
    interval = configuration.interval
    return {
        **header(device),
        "configuration": configuration.as_dict(),
        "intervals": intervals,
        "steps": time_steps(contestants, x, y, intervals * interval, interval),
    }


def time_steps(contestants, x, y, steps, untimed, failed=None):
    """Time steps of every contestant on one batch, relative to the first; see `take_turns`.

    Returns
    -------
    {name: costs}, as `measure_steps` describes them.
    """
    times, extra = take_turns(contestants, x, y, steps, untimed, failed)
    base = statistics.mean(times[next(iter(contestants))][untimed:])
    measured = {}
    for name, every in times.items():
        seconds = every[untimed:]
        step = contestants[name]
        state = _bytes(step.optimizer.state_dict())
        weights = sum(p.numel() * p.element_size() for p in step.model.parameters())
        measured[name] = {
            "mean": statistics.mean(seconds),
            "median": statistics.median(seconds),
            "worst": max(seconds),
            "first": every[0],
            "mean_ratio": statistics.mean(seconds) / base,
            "worst_ratio": max(seconds) / base,
            "state_bytes": state,
            "parameter_bytes": weights,
            "peak_bytes": extra[name] + 2 * weights + state if x.is_cuda else None,
        }
    return measured


def take_turns(contestants, x, y, steps, untimed, failed=None):
    """Step by step, the order reversed every other time.

    Parameters
    ----------
    contestants : {name: step}; a step is called with the batch and has a `model` and an
        `optimizer`, as a `TrainingStep` has.
    x, y : the batch, on the device of the models.
    steps : how many are timed; whole intervals, so that a mean is one.
    untimed : how many come before those that count.
    failed : {name: exception} to put a contestant into that fails; None: exceptions pass.

    Returns
    -------
    ({name: seconds of each step, the untimed ones first}, {name: most bytes that a timed step
    allocated; CUDA only}), without those that failed.
    """
    device, running = x.device, dict(contestants)
    times = {name: [] for name in running}
    extra = dict.fromkeys(running, 0)
    for turn in range(-untimed, steps):
        order = list(running)
        for name in order if turn % 2 == 0 else order[::-1]:
            before = _allocated(device, reset=True)
            start = time.perf_counter()
            try:
                running[name](x, y)
                _wait(device)
            except Exception as error:
                if failed is None:
                    raise
                failed[name] = error
                del running[name], times[name], extra[name]
                continue
            times[name].append(time.perf_counter() - start)
            if turn >= 0:
                extra[name] = max(extra[name], _allocated(device) - before)
    return times, extra


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


class TrainingStep:
    """One model with its optimizer; called with a batch, it takes a step."""

    def __init__(self, model, optimizer, loss):
        self.model, self.optimizer, self.loss = model, optimizer, loss

    def __call__(self, x, y):
        self.optimizer.zero_grad()
        self.backward(self.forward(x, y))
        self.optimizer.step()

    def forward(self, x, y):
        """The loss of the batch."""
        return self.loss(self.model(x), x, y)

    def backward(self, loss):
        """Its gradients."""
        loss.backward()


def contestant(configuration, images, device):
    """The step that a configuration describes, with fresh weights."""
    model = build_model(configuration, images).to(device)
    optimizer = build_optimizer(configuration, model)
    return TrainingStep(model, optimizer, NETWORKS[configuration.model].task.loss)


def random_batch(configuration, images, device):
    """Inputs and labels of the data set's shape, the same at every call."""
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


def _bytes(state, seen=None):
    """Of all tensors in a nested state, each once; the weights themselves are left out."""
    seen = set() if seen is None else seen
    if id(state) in seen or isinstance(state, torch.nn.Parameter | torch.nn.Module | type):
        return 0
    seen.add(id(state))
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(_bytes(value, seen) for value in state.values())
    if isinstance(state, list | tuple | set):
        return sum(_bytes(value, seen) for value in state)
    return _bytes(vars(state), seen) if hasattr(state, "__dict__") else 0
