"""What cheaper statistics cost: distance to the exact preconditioner, and training curves.

    python -m benchmarks.accuracy --data-folder FOLDER                  (an hour on one core)
    python -m benchmarks.accuracy --data-folder FOLDER --device cuda --at-once 12
    python -m benchmarks.accuracy --race mnist-5k-autoencoder --at-once 2

distance    One TEKFAC trains the race's network. Beside it, on the same weights, gradients and
            batches, others keep cheaper statistics and never move a weight. Every interval all
            precondition the same gradient: ‖direction − exact direction‖ / ‖exact direction‖. To
            compare with: the exact method, whose statistics come from other batches.
curves      The race with TEKFAC's tuned settings, one thing changed at a time.

The record is records/accuracy.json: device, versions, commit, command, date, and all numbers.
"""

import copy
import dataclasses
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from tabulate import tabulate
from torch.nn.functional import cross_entropy

from benchmarks import RECORDS
from tekfac_edu.data.batches import Batches
from tekfac_edu.experiments.at_once import AtOnce
from tekfac_edu.experiments.building import build_images, build_model, build_optimizer
from tekfac_edu.experiments.configuration import Configuration, Cost
from tekfac_edu.experiments.presets import PRESETS
from tekfac_edu.experiments.records import header, read_races, write_json
from tekfac_edu.experiments.reporting import by_optimizer
from tekfac_edu.optim.settings import COSTS

RACES = ("cifar10-mini", "digits-mlp", "mnist-5k-autoencoder")
VARIANTS = {
    "exact": Cost(),
    "rows 16": Cost(factor_rows=16),
    "rows 4": Cost(factor_rows=4),
    "rows 1": Cost(factor_rows=1),
    "scale 64": Cost(eigenvalue_examples=64),
    "scale 32": Cost(eigenvalue_examples=32),
    "scale 8": Cost(eigenvalue_examples=8),
    "rows 4, scale 32": Cost(factor_rows=4, eigenvalue_examples=32),
    "qr": Cost(eigenbasis="qr"),
    "input rank 128": Cost(input_rank=128),
    "input rank 64": Cost(input_rank=64),
    "input rank 16": Cost(input_rank=16),
    "input rank 128, qr": Cost(input_rank=128, eigenbasis="qr"),
    "input rank 64, qr": Cost(input_rank=64, eigenbasis="qr"),
    "bfloat16": Cost(precision="bfloat16"),
    "rows 4, scale 32, qr": Cost(factor_rows=4, eigenvalue_examples=32, eigenbasis="qr"),
}
FOUR, TWO = (
    partial(Cost, factor_rows=rows, eigenvalue_examples=32, stagger=True) for rows in (4, 2)
)
ORDER_ONLY = {  # what does not change a statistic, but when it is taken
    "turns": {"cost": Cost(stagger=True)},
    "turns, rows 4, scale 32": {"cost": FOUR()},
    "turns, rows 4, scale 32, qr": {"cost": FOUR(eigenbasis="qr")},
    "turns, rows 2, scale 32, bfloat16": {"cost": TWO(precision="bfloat16")},
    "turns, rows 2, scale 32, input rank 64, qr": {"cost": TWO(input_rank=64, eigenbasis="qr")},
    "turns, rows 2, scale 32, rank 64, qr, bfloat16": {
        "cost": TWO(input_rank=64, eigenbasis="qr", precision="bfloat16")
    },
    "turns, rows 2, scale 32, rank 128, qr, bfloat16": {
        "cost": TWO(input_rank=128, eigenbasis="qr", precision="bfloat16")
    },
    "no warm-up": {"warmup": 0},
    "interval 100": {"interval": 100},
}
SUMMED = {"positions": "summed"}
OTHER_STEPS = {  # other factors, or steps that are bounded
    "summed positions": SUMMED,
    "summed positions, trust 0.001": SUMMED | {"trust": 1e-3},
    "summed positions, trust 0.001, low cost": SUMMED | {"trust": 1e-3, "cost": COSTS["low"]},
}
CHANGES = {name: {"cost": cost} for name, cost in VARIANTS.items()} | ORDER_ONLY | OTHER_STEPS


def main(
    race: Literal[RACES] = "cifar10-mini",
    parts: tuple[Literal["distance", "curves"], ...] = ("distance", "curves"),
    data_folder: Path | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    variants: tuple[str, ...] = tuple(CHANGES),
    seeds: tuple[int, ...] = (0, 1, 2, 3),
    at_once: int = 1,
    steps: int = 200,
    width: int | None = None,
    epochs: int | None = None,
    train_images: int | None = None,
    runs: Path = Path("runs/accuracy"),
    record: Path = RECORDS / "accuracy.json",
):
    """Measure both parts.

    Args:
        race: whose network, data and tuned settings.
        parts: which.
        data_folder: Parquet files of CIFAR-10; default: download once.
        device: cpu or cuda.
        variants: of both parts; the exact one is run in any case.
        seeds: of the curves.
        at_once: runs at a time.
        steps: of the distances.
        width: of the network whose distances are measured; default: as published, 16.
        epochs: of the curves; default: the preset's.
        train_images: of CIFAR-10, of the curves; default: all in the folder.
        runs: where the curves' runs are kept.
        record: where the record goes.
    """
    folder = data_folder and str(data_folder)
    base = PRESETS[race].base.replace(**tuned(race), optimizer="tekfac")
    chosen = {n: c for n, c in CHANGES.items() if n in variants or n == "exact"}
    content = {**header(device), "race": race, "variants": written(chosen)}
    if "distance" in parts:
        if base.fisher != "empirical":
            sys.exit(f"{race} samples labels; distances are measured under the empirical Fisher")
        configuration = base.replace(width=width, interval=10, warmup=0)
        content["distance"] = distances(configuration, chosen, steps, folder, device)
        print(distance_table(content["distance"]), flush=True)
    if "curves" in parts:
        base = base.replace(epochs=epochs or base.epochs, train_images=train_images)
        content["curves"] = curves(base, chosen, seeds, runs, at_once, folder, device)
        print(curves_table(content["curves"]), flush=True)
    write_json(record, content)


def written(variants):
    """For the record: what each changes."""
    return {
        name: {
            setting: dataclasses.asdict(value) if isinstance(value, Cost) else value
            for setting, value in changes.items()
        }
        for name, changes in variants.items()
    }


def tuned(race):
    """lr, damping and weight decay of TEKFAC in a race."""
    runs, _ = read_races([RECORDS / f"{race.replace('-', '_')}.json"])
    settings = by_optimizer(runs)["tekfac"][0]["configuration"]
    return {name: settings[name] for name in ("lr", "damping", "weight_decay")}


def distances(configuration, variants, steps, folder, device):
    """Per variant, at the end of each interval, the distance over all factored weights.

    Returns
    -------
    dict: configuration, steps (those measured at), distance: {variant: list}
    """
    images = build_images(configuration, folder, device)
    model = build_model(configuration, images).to(device)
    twin = copy.deepcopy(model)
    leader = build_optimizer(configuration, model)
    watchers = {
        name: build_optimizer(configuration.replace(**changes), model)
        for name, changes in variants.items()
        if name in VARIANTS and name != "exact"
    }
    watchers["exact, other batches"] = build_optimizer(configuration, twin)
    for watcher in watchers.values():
        for group in watcher.param_groups:
            group["lr"], group["momentum"] = 0.0, 0.0
    batches = endless(Batches(images, configuration.batch_size, True, seed=0))
    others = endless(Batches(images, configuration.batch_size, True, seed=1))
    found = {name: [] for name in watchers}
    measured = []
    for step in range(1, steps + 1):
        twin.load_state_dict(model.state_dict())
        for optimizer in (leader, *watchers.values()):
            optimizer.zero_grad()
        for network, (x, y) in ((model, next(batches)), (twin, next(others))):
            cross_entropy(network(x), y).backward()
        for watcher in watchers.values():
            watcher.step()
        due = step % configuration.interval == 0
        if due:
            gradients = [layer.gradient() for layer in leader.layers]
        leader.step()
        if due:
            measured.append(step)
            exact = directions(leader, gradients)
            for name, watcher in watchers.items():
                other = directions(watcher, gradients)
                found[name].append(float(f"{((other - exact).norm() / exact.norm()).item():.4g}"))
    return {"configuration": configuration.as_dict(), "steps": measured, "distance": found}


def directions(optimizer, gradients):
    """All preconditioned, in one vector."""
    return torch.cat(
        [
            optimizer.precondition(layer.module, M).flatten()
            for layer, M in zip(optimizer.layers, gradients, strict=True)
        ]
    )


def endless(batches):
    """Epoch after epoch."""
    epoch = 0
    while True:
        yield from batches.epoch(epoch)
        epoch += 1


def curves(base: Configuration, variants, seeds, folder, at_once, data_folder, device):
    """Every variant with every seed, seed by seed.

    Returns
    -------
    list of dict: variant, seed, train_loss per epoch, test_score per epoch, seconds
    """
    planned = [
        (name, base.replace(**changes, seed=seed))
        for seed in seeds
        for name, changes in variants.items()
    ]

    def run(variant):
        name, configuration = variant
        return runs.train(configuration, Path(folder) / name / configuration.name)

    with AtOnce(at_once, data_folder=data_folder, device=device, bar=False) as runs:
        done = runs.map(run, planned)
    return [
        {
            "variant": name,
            "seed": configuration.seed,
            "status": run["status"],
            "train_loss": [epoch["train_loss"] for epoch in run["epochs"]],
            "test_score": [epoch["test_score"] for epoch in run["epochs"]],
            "cpu_seconds": run["epochs"][-1]["cpu_seconds"],
        }
        for (name, configuration), run in zip(planned, done, strict=True)
    ]


def distance_table(measured):
    """Median and largest over the second half of the steps."""
    rows = []
    for name, values in measured["distance"].items():
        late = values[len(values) // 2 :]
        rows.append([name, f"{statistics.median(late):.3f}", f"{max(late):.3f}"])
    return tabulate(rows, ["statistics", "median distance", "largest"], disable_numparse=True)


def curves_table(runs):
    """Mean and standard deviation over seeds of the last epoch, and pairwise against exact."""
    last = {}
    for run in runs:
        if run["status"] == "finished":
            last.setdefault(run["variant"], {})[run["seed"]] = run["train_loss"][-1]
    rows = []
    for name, by_seed in last.items():
        against = [by_seed[seed] - last["exact"][seed] for seed in by_seed if seed in last["exact"]]
        spread = statistics.stdev(by_seed.values()) if len(by_seed) > 1 else 0.0
        apart = statistics.stdev(against) / len(against) ** 0.5 if len(against) > 1 else 0.0
        rows.append(
            [
                name,
                f"{statistics.mean(by_seed.values()):.3f} ± {spread:.3f}",
                f"{statistics.mean(against):+.3f} ± {apart:.3f}",
            ]
        )
    headers = ["statistics", "last training loss", "minus exact, s.e."]
    return tabulate(rows, headers, disable_numparse=True)


if __name__ == "__main__":
    tyro.cli(main)
