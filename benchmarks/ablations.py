"""Which knob matters? One at a time, around the settings that the race on digits was tuned to.

    python -m benchmarks.ablations                         (minutes on one core)

Every run is one of `tekfac_edu.experiments`: a perceptron 64-64-64-10 on scikit-learn's digits, 20
epochs, with the settings of records/digits_mlp.json, and one thing changed. Nothing is tuned again
after the change. The record is records/ablations.json: device, versions, commit, command, date,
and of every run where it ended.
"""

import tempfile

import torch

from benchmarks import RECORDS
from tekfac_edu.experiments.configuration import Cost
from tekfac_edu.experiments.methods import KRONECKER
from tekfac_edu.experiments.presets import PRESETS
from tekfac_edu.experiments.records import header, read_races, write_json
from tekfac_edu.experiments.training import train

RECORD = RECORDS / "ablations.json"
SEEDS = (0, 1, 2, 3, 4)
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
INTERVALS = (1, 3, 10, 30, 100)
DECAYS = (0.0, 0.5, 0.9, 0.95, 0.99)


def tuned_settings():
    """{optimizer: lr and damping} of the race on digits."""
    runs, _ = read_races([RECORDS / "digits_mlp.json"])
    return {
        c["optimizer"]: {"lr": c["lr"], "damping": c["damping"]}
        for c in (run["configuration"] for run in runs)
        if c["optimizer"] in KRONECKER
    }


def ablations(tuned):
    """Yield (knob, optimizer, value on the axis, changes to the tuned configuration)."""
    lr, damping = tuned["tekfac"]["lr"], tuned["tekfac"]["damping"]
    for factor in (0.1, 10**-0.5, 1, 10**0.5, 10):
        yield "lr", "tekfac", _two_digits(lr * factor), {"lr": _two_digits(lr * factor)}
    for value in DAMPINGS:
        for name in KRONECKER:
            yield "damping", name, value, {"damping": value}
        for name in ("kfac", "tkfac"):
            yield "damping, added", name, value, {"damping": value, "damping_rule": "added"}
        # η = α/λ: with α held constant, η falls as λ grows
        constant = {"damping": value, "lr": lr * damping / value}
        yield "damping, constant α", "tekfac", value, constant
    for value in INTERVALS:
        yield "interval", "tekfac", value, {"interval": value}
        yield "interval, no warm-up", "tekfac", value, {"interval": value, "warmup": 0}
        decay = 0.95 ** (value / 10)  # as many steps back as with an interval of 10
        yield "interval, same memory", "tekfac", value, {"interval": value, "decay": decay}
    for value in DECAYS:
        yield "decay", "tekfac", value, {"decay": value}
    for value in ("empirical", "mc", "exact"):
        yield "fisher", "tekfac", value, {"fisher": value}
    for value in ("eigh", "qr"):
        yield "eigenbasis", "tekfac", value, {"cost": Cost(eigenbasis=value)}


def _two_digits(value):
    return float(f"{value:.2g}")


def ended(knob, value, configuration):
    """One run for the record."""
    with tempfile.TemporaryDirectory() as folder:
        run = train(configuration, folder, device="cpu", bar=False)
    last = run["epochs"][-1]
    return {
        "knob": knob,
        "optimizer": configuration.optimizer,
        "value": value,
        "seed": configuration.seed,
        "status": run["status"],
        **{name: last[name] for name in ("train_loss", "test_loss", "test_score", "cpu_seconds")},
    }


def main():
    torch.set_num_threads(1)
    base, tuned = PRESETS["digits-mlp"].base, tuned_settings()
    record = {
        **header("cpu"),
        "seeds": SEEDS,
        "configuration": base.replace(optimizer="tekfac", **tuned["tekfac"]).as_dict(),
        "tuned": tuned,
        "runs": [],
    }
    for knob, name, value, changes in ablations(tuned):
        configuration = base.replace(optimizer=name, **tuned[name] | changes)
        runs = [ended(knob, value, configuration.replace(seed=seed)) for seed in SEEDS]
        losses = "  ".join(f"{run['train_loss'] or float('inf'):.2e}" for run in runs)
        print(f"{knob:22s} {name:6s} {value!s:9s} training loss {losses}", flush=True)
        record["runs"] += runs
    write_json(RECORD, record)


if __name__ == "__main__":
    main()
