"""Where the time of a step goes: seconds by phase, on one network, for the four methods.

    python benchmarks/step_profile.py                                  (minutes on one core)
    python benchmarks/step_profile.py --device cuda --model vgg16 --interval 50

The clock stops at every change of phase and, on a GPU, waits for the device there; such a step is
slower than one that nobody watches, so read the shares, and take totals from `tekfac-edu bench`.
The record is records/step_profile.json: device, versions, command, date, seconds per step.
"""

import datetime
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
import tyro

from tekfac_edu.experiments.configuration import KRONECKER, Configuration
from tekfac_edu.experiments.records import FORMAT, circumstances, write_json
from tekfac_edu.experiments.step_cost import blank_images, contestant, random_batch
from tekfac_edu.optim import batch, capture, curvature

RECORD = Path(__file__).parent / "records" / "step_profile.json"
PHASES = {
    "forward": "the network's forward pass",
    "backward": "and its backward pass",
    "capture": "hooks: inputs and output gradients are kept",
    "patches": "patches of the inputs, gradients brought into the same order",
    "factors": "second moments of both, running averages apart",
    "eigh": "eigenbases of the two factors",
    "move": "D carried into the new basis",
    "measure": "D of the batch, from per-example gradients in the basis (EKFAC, TEKFAC)",
    "update": "preconditioning, momentum, the step",
    "other": "sums, averages, checks of finiteness, zero_grad",
}


class Clock:
    """Charges the time since the last change of phase to the innermost phase."""

    def __init__(self, device):
        self.device = torch.device(device)
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.inside = ["other"]
        self.mark = self._now()

    def _now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def charge(self):
        """To the phase that is on."""
        now = self._now()
        self.seconds[self.inside[-1]] += now - self.mark
        self.mark = now

    @contextmanager
    def phase(self, name):
        """While the block lasts."""
        self.charge()
        self.inside.append(name)
        try:
            yield
        finally:
            self.charge()
            self.inside.pop()

    def timed(self, function, name):
        """The same function, as this phase."""

        def wrapper(*args, **kwargs):
            with self.phase(name):
                return function(*args, **kwargs)

        return wrapper

    @contextmanager
    def watching(self, step):
        """Time the parts of this training step while the block lasts."""
        optimizer = step.optimizer
        parts = (
            (step, "forward", "forward"),
            (step, "backward", "backward"),
            (capture.ForwardHook, "__call__", "capture"),
            (capture.Capture, "receive", "capture"),
            (batch.Examples, "pair", "patches"),
            (optimizer, "estimate_factors", "factors"),
            (curvature.LayerCurvature, "decompose", "eigh"),
            (curvature.LayerCurvature, "turn_to", "move"),
            (batch.Examples, "corrected_eigenvalues", "measure"),
            (optimizer, "_update", "update"),
        )
        with ExitStack() as stack:
            for owner, name, phase in parts:
                wrapped = self.timed(getattr(owner, name), phase)
                stack.enter_context(mock.patch.object(owner, name, wrapped))
            yield


def profile_step(configuration, device, intervals=1):
    """Mean seconds of a step in each of PHASES, over whole intervals, after one untimed refresh.

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
    if configuration.optimizer not in KRONECKER:
        raise ValueError(
            f"optimizer must be one of {', '.join(KRONECKER)}; got {configuration.optimizer!r}"
        )
    configuration = configuration.replace(warmup_steps=0)
    dense = configuration.model in ("mlp", "autoencoder")
    images = blank_images((1, 28, 28) if dense else (3, 32, 32))
    step = contestant(configuration, images, device)
    x, y = random_batch(configuration, images, torch.device(device))
    for _ in range(configuration.interval):  # a whole one, so that the next begins with a refresh
        step(x, y)
    clock = Clock(device)
    steps = intervals * configuration.interval
    with clock.watching(step):
        clock.mark = clock._now()
        for _ in range(steps):
            step(x, y)
        clock.charge()
    return {phase: seconds / steps for phase, seconds in clock.seconds.items()}


def main(
    model: Literal["mlp", "resnet20", "vgg16"] = "resnet20",
    device: Literal["cpu", "cuda"] = "cpu",
    interval: int = 10,
    intervals: int = 1,
    batch_size: int = 128,
    width: int | None = None,
    record: Path = RECORD,
):
    """Profile the four methods.

    Args:
        model: on 32×32 in colour; mlp on 28×28 digits.
        device: cpu or cuda.
        interval: steps between refreshes.
        intervals: how many are timed, after one that is not.
        batch_size: examples in a step.
        width: channels of the first stage; default: the networks as published.
        record: where the record goes.
    """
    configuration = Configuration(
        model=model, interval=interval, batch_size=batch_size, width=width
    )
    profiles = {}
    for name in KRONECKER:
        profiles[name] = profile_step(configuration.replace(optimizer=name), device, intervals)
        total = sum(profiles[name].values())
        shares = ", ".join(f"{p} {s / total:.0%}" for p, s in profiles[name].items())
        print(f"{name:6} {1e3 * total:8.1f} ms a step: {shares}", flush=True)
    content = {
        "format": FORMAT,
        **circumstances(device),
        "command": " ".join(["python", "benchmarks/step_profile.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "configuration": configuration.replace(warmup_steps=0).as_dict(),
        "intervals": intervals,
        "seconds_per_step": profiles,
    }
    write_json(record, content)


if __name__ == "__main__":
    tyro.cli(main)
