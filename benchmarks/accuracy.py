"""What cheaper statistics cost: distance to the exact preconditioner, and training curves.

    python benchmarks/accuracy.py --data-folder FOLDER                  (an hour on one core)
    python benchmarks/accuracy.py --data-folder FOLDER --device cuda --at-once 12
    python benchmarks/accuracy.py --race mnist-5k-autoencoder --at-once 2

distance    One TEKFAC trains the race's network. Beside it, on the same weights, gradients and
            batches, others keep cheaper statistics and never move a weight. Every interval all
            precondition the same gradient: ‖direction − exact direction‖ / ‖exact direction‖. To
            compare with: the exact method, whose statistics come from other batches.
curves      The race with TEKFAC's tuned settings, one thing changed at a time.

The record is records/accuracy.json: device, versions, commit, command, date, and all numbers.
"""

import copy
import datetime
import shlex
import statistics
import sys
from pathlib import Path
from typing import Literal

import torch
import tyro
from tabulate import tabulate
from torch.nn.functional import cross_entropy

from tekfac_edu.data.batches import Batches
from tekfac_edu.experiments.building import build_images, build_model, build_optimizer
from tekfac_edu.experiments.configuration import Configuration
from tekfac_edu.experiments.presets import PRESETS
from tekfac_edu.experiments.records import FORMAT, circumstances, read_races, write_json
from tekfac_edu.experiments.reporting import by_optimizer
from tekfac_edu.experiments.side_by_side import one_run, side_by_side
from tekfac_edu.experiments.training import train
from tekfac_edu.optim.refusals import gradient_of

RECORDS = Path(__file__).parent / "records"
RACES = ("cifar10-mini", "digits-mlp", "mnist-5k-autoencoder")
VARIANTS = {
    "exact": {},
    "rows 16": {"factor_rows": 16},
    "rows 4": {"factor_rows": 4},
    "rows 1": {"factor_rows": 1},
    "scale 64": {"scale_examples": 64},
    "scale 32": {"scale_examples": 32},
    "scale 8": {"scale_examples": 8},
    "rows 4, scale 32": {"factor_rows": 4, "scale_examples": 32},
    "qr": {"eigenbasis": "qr"},
    "input rank 128": {"input_rank": 128},
    "input rank 64": {"input_rank": 64},
    "input rank 16": {"input_rank": 16},
    "input rank 128, qr": {"input_rank": 128, "eigenbasis": "qr"},
    "input rank 64, qr": {"input_rank": 64, "eigenbasis": "qr"},
    "bfloat16": {"precision": "bfloat16"},
    "rows 4, scale 32, qr": {"factor_rows": 4, "scale_examples": 32, "eigenbasis": "qr"},
}
ORDER_ONLY = {  # what does not change a statistic, but when it is taken
    "turns": {"stagger": True},
    "turns, rows 4, scale 32": {"stagger": True, "factor_rows": 4, "scale_examples": 32},
    "turns, rows 4, scale 32, qr": {
        "stagger": True,
        "factor_rows": 4,
        "scale_examples": 32,
        "eigenbasis": "qr",
    },
    "turns, rows 2, scale 32, bfloat16": {
        "stagger": True,
        "factor_rows": 2,
        "scale_examples": 32,
        "precision": "bfloat16",
    },
    "turns, rows 2, scale 32, input rank 64, qr": {
        "stagger": True,
        "factor_rows": 2,
        "scale_examples": 32,
        "input_rank": 64,
        "eigenbasis": "qr",
    },
    "turns, rows 2, scale 32, rank 64, qr, bfloat16": {
        "stagger": True,
        "factor_rows": 2,
        "scale_examples": 32,
        "input_rank": 64,
        "eigenbasis": "qr",
        "precision": "bfloat16",
    },
    "turns, rows 2, scale 32, rank 128, qr, bfloat16": {
        "stagger": True,
        "factor_rows": 2,
        "scale_examples": 32,
        "input_rank": 128,
        "eigenbasis": "qr",
        "precision": "bfloat16",
    },
    "no warm-up": {"warmup_steps": 0},
    "interval 100": {"interval": 100},
}


def main(
    race: Literal[RACES] = "cifar10-mini",
    parts: tuple[Literal["distance", "curves"], ...] = ("distance", "curves"),
    data_folder: Path | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    variants: tuple[str, ...] = tuple(VARIANTS | ORDER_ONLY),
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
        at_once: runs side by side.
        steps: of the distances.
        width: of the network whose distances are measured; default: as published, 16.
        epochs: of the curves; default: the preset's.
        train_images: of CIFAR-10, of the curves; default: all in the folder.
        runs: where the curves' runs are kept.
        record: where the record goes.
    """
    folder = data_folder and str(data_folder)
    base = PRESETS[race].base.replace(**tuned(race), optimizer="tekfac")
    chosen = {n: c for n, c in (VARIANTS | ORDER_ONLY).items() if n in variants or n == "exact"}
    content = {
        "format": FORMAT,
        **circumstances(device),
        "command": shlex.join(["python", "benchmarks/accuracy.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "race": race,
        "variants": chosen,
    }
    if "distance" in parts:
        if base.fisher != "empirical":
            sys.exit(f"{race} samples labels; distances are measured under the empirical Fisher")
        configuration = base.replace(width=width, interval=10, warmup_steps=0)
        content["distance"] = distances(configuration, chosen, steps, folder, device)
        print(distance_table(content["distance"]), flush=True)
    if "curves" in parts:
        base = base.replace(epochs=epochs or base.epochs, train_images=train_images)
        content["curves"] = curves(base, chosen, seeds, runs, at_once, folder, device)
        print(curves_table(content["curves"]), flush=True)
    write_json(record, content)


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
        if name in VARIANTS and changes
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
            gradients = [gradient_of(layer) for layer in leader.layers]
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
    how = {"data_folder": data_folder, "device": device, "bar": False}
    planned = [
        (name, base.replace(**changes, seed=seed))
        for seed in seeds
        for name, changes in variants.items()
    ]
    places = [Path(folder) / name / configuration.name for name, configuration in planned]
    if at_once == 1:
        done = [train(c, place, **how) for (_, c), place in zip(planned, places, strict=True)]
    else:
        lines = [one_run(c, place, how) for (_, c), place in zip(planned, places, strict=True)]
        done = side_by_side(lines, at_once)
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
