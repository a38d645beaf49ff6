"""Tests of tekfac_edu.experiments: small runs on the digits, left alone or stopped somewhere.

Processes that are to be stopped are forked from one that has imported torch already.
"""

import json
import multiprocessing
import os
import pkgutil
import sys
from dataclasses import replace

import torch

from tekfac_edu.experiments import building, checkpoints
from tekfac_edu.experiments.configuration import Configuration
from tekfac_edu.experiments.methods import OPTIMIZERS
from tekfac_edu.experiments.presets import Preset
from tekfac_edu.experiments.training import train

PRELOAD = ["sklearn.datasets", "tekfac_edu.experiments.training", "torch._dynamo", "tyro"]
STEPS = 5  # in an epoch
TINY = Configuration("mlp", "digits", widths=(8,), epochs=2, batch_size=256, interval=2)
RATES = dict(zip(OPTIMIZERS, (0.3, 0.01, 0.3, 0.3, 0.3, 0.3), strict=True))
OF_THE_CLOCK = ("seconds", "cpu_seconds")
OF_THE_DAY = ("continued", "command", "date", "commit", "processes", "device")


def tiny(optimizer="tekfac", **changes):
    """A configuration that takes a tenth of a second."""
    return TINY.replace(optimizer=optimizer, lr=RATES[optimizer], warmup=3).replace(**changes)


def tiny_preset(**changes):
    """A race of such runs."""
    starts = {name: {"lr": lr, "damping": 0.01, "weight_decay": 0.0} for name, lr in RATES.items()}
    for name in ("sgd", "adam"):
        del starts[name]["damping"]
    return replace(Preset("tiny", tiny(), starts, (1.0,), 1), **changes)


def run(configuration, folder, **options):
    """To the end, in this process."""
    return train(configuration, folder, device="cpu", bar=False, **options)


def numbers(record):
    """A record without what the clock, the day and the command decide."""
    kept = {name: value for name, value in record.items() if name not in OF_THE_DAY}
    kept["epochs"] = [
        {name: value for name, value in epoch.items() if name not in OF_THE_CLOCK}
        for epoch in record["epochs"]
    ]
    return json.loads(json.dumps(kept))


def last_state(folder):
    """Weights, momenta, curvatures, schedule, losses: all but the clock's, in full precision."""
    state = torch.load(checkpoints.checkpoints(folder)[-1], weights_only=True)
    position = state["position"]
    del position["continued"], position["seconds"], position["cpu_seconds"]
    for epoch in position["epochs"]:
        for name in OF_THE_CLOCK:
            del epoch[name]
    return state


def same_bits(one, other):
    """Whether two nested states are equal, to the last bit of every tensor."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_bits(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_bits, one, other))
    return type(one) is type(other) and one == other


def flipped(path, part=0.5):
    """Damage one byte of a file, so far from its beginning."""
    content = bytearray(path.read_bytes())
    content[int(part * len(content))] ^= 0xFF
    path.write_bytes(content)


def poisoned():
    """The digits with test labels that are none: whoever looks at them gets an error."""
    images = building.load_images("digits")
    return replace(images, y_test=torch.full_like(images.y_test, 999))


# other processes


def in_process(function, *arguments, timeout=60):
    """Call a function of a test module in a process of its own; its exit code, -9 if killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=function, args=arguments)
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"not over after {timeout} s")
    return process.exitcode


def write_output_to(path):
    """Let standard output and error of this process go into a file."""
    sys.stdout.flush()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)


class Nth:
    """A function, "module:name", that does something else before its n-th call, counted from 1."""

    def __init__(self, where, n, before):
        owner, _, name = where.rpartition("." if "." in where.partition(":")[2] else ":")
        owner = pkgutil.resolve_name(owner)
        self.function, self.n, self.before, self.calls = getattr(owner, name), n, before, 0
        setattr(owner, name, lambda *arguments, **named: self(*arguments, **named))

    def __call__(self, *arguments, **named):
        self.calls += 1
        if self.calls == self.n:
            self.before(*arguments, **named)
        return self.function(*arguments, **named)
