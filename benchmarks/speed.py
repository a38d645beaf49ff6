"""What a step costs, ours and other packages', as ratios to SGD.

    python -m benchmarks.speed                              (half an hour on two cores)
    python -m benchmarks.speed --device cuda --models resnet20 vgg16 --record records/speed_gpu.json

All optimizers take turns in one process: mean, median and worst step, state, memory; the median of
whole repetitions, with lowest and highest. Statistics, bases and eigenvalues are refreshed every
`interval` steps, of peers whatever they refresh. Peers are the packages in peers.txt; one that is
not installed, or fails, is left out, with the reason.

The record is records/speed.json, the figure figures/step_cost.png. How the cost grows: growth.py.
"""

import dataclasses
import math
import statistics
import time
from pathlib import Path
from typing import Literal

import torch
import tyro
from matplotlib.ticker import LogLocator, NullFormatter
from tabulate import tabulate

from benchmarks import FIGURES, RECORDS
from benchmarks import peers as other_packages
from tekfac_edu.experiments.building import build_model
from tekfac_edu.experiments.configuration import Configuration, Cost
from tekfac_edu.experiments.methods import METHODS, OPTIMIZERS
from tekfac_edu.experiments.networks import NETWORKS
from tekfac_edu.experiments.records import header, write_json
from tekfac_edu.experiments.reporting import NAMES
from tekfac_edu.experiments.step_cost import (
    TrainingStep,
    blank_images,
    contestant,
    random_batch,
    time_steps,
)
from tekfac_edu.figures import METHOD_STYLES, page_figure, use_book_style
from tekfac_edu.optim.settings import EXACT

UNTIMED = 3  # steps before the timed ones: buffers exist then, and each interval has its refresh
MEASURED = ("mean", "median", "worst", "first", "mean_ratio", "median_ratio", "worst_ratio")
PEER_COLOR = "#0F7F5E"
TINY = {"mlp": {"widths": (8,)}, "resnet20": {"width": 2}, "vgg16": {"width": 2}}


def contestants(configuration, images, device, optimizers, peers, cost):
    """({name: step}, {name: exception}): SGD first, then the others, then the peers.

    Parameters
    ----------
    configuration : Configuration, for all of them. peers: {name: function}, as in `peers.py`.
    cost : Cost; unless it is the exact one, each of ours runs both without and with it (KFAC and
        TKFAC with "eigh" in any case).
    """
    steps, failed = {}, {}
    for name in ("sgd", *(name for name in optimizers if name != "sgd")):
        ours = configuration.replace(optimizer=name)
        steps[NAMES[name]] = contestant(ours, images, device)
        if cost != Cost() and (possible := METHODS[name].eigenbases):
            basis = cost.eigenbasis if cost.eigenbasis in possible else possible[0]
            ours = ours.replace(cost=dataclasses.replace(cost, eigenbasis=basis))
            steps[f"{NAMES[name]}, options"] = contestant(ours, images, device)
    loss = NETWORKS[configuration.model].task.loss
    for name, make in peers.items():
        model = build_model(configuration, images).to(device)
        try:
            made = make(model, configuration.interval)
        except Exception as error:
            failed[name] = error
            continue
        steps[name] = made if callable(made) else TrainingStep(model, made, loss)
    return steps, failed


def measure(configuration, device, optimizers, peers, cost, repetitions, steps):
    """One network and one interval, for the record.

    Returns
    -------
    dict: configuration, timed_steps and untimed_steps of a repetition, "optimizers": {name: each of
    MEASURED as {median, low, high} over the repetitions, and the bytes}, "left_out": {name: why}.
    """
    configuration = configuration.replace(warmup=0)
    images = blank_images(NETWORKS[configuration.model].image)
    interval = configuration.interval
    timed = interval * math.ceil(steps / interval)
    x, y = random_batch(configuration, images, device)
    rounds, left_out = [], {}
    for _ in range(repetitions):
        wanted = {name: make for name, make in peers.items() if name not in left_out}
        running, failed = contestants(configuration, images, device, optimizers, wanted, cost)
        costs = time_steps(running, x, y, timed, UNTIMED, failed)
        for name in wanted.keys() & costs.keys():
            if not all(p.isfinite().all() for p in running[name].model.parameters()):
                failed[name] = ArithmeticError("its weights are not finite any more")
        for name, error in failed.items():
            if name not in peers:
                raise error
            left_out[name] = reason(error)
            print(f"{name} is left out: {left_out[name]}", flush=True)
        rounds.append(costs)
        del running  # before the next are built
    measured = {}
    for name, first in rounds[0].items():
        if name in left_out:
            continue
        for costs in rounds:
            base = costs[NAMES["sgd"]]["mean"]
            costs[name]["median_ratio"] = costs[name]["median"] / base
        measured[name] = {
            key: spread([costs[name][key] for costs in rounds]) for key in MEASURED
        } | {key: first[key] for key in ("state_bytes", "parameter_bytes", "peak_bytes")}
    return {
        "configuration": configuration.as_dict(),
        "timed_steps": timed,
        "untimed_steps": UNTIMED,
        "optimizers": measured,
        "left_out": left_out,
    }


def spread(values):
    """Over repetitions."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def reason(error):
    """An exception in one line, short enough for a table."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 200 else text[:199] + "…"


def steps_table(measured):
    """The result of `measure` as text."""

    def with_range(cost, key, digits):
        low, high = cost[key]["low"], cost[key]["high"]
        return f"{cost[key]['median']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    rows = [
        [
            name,
            f"{1e3 * cost['mean']['median']:.2f}",
            with_range(cost, "mean_ratio", 2),
            f"{cost['median_ratio']['median']:.2f}",
            with_range(cost, "worst_ratio", 1),
            f"{cost['state_bytes'] / cost['parameter_bytes']:.1f}",
            "" if cost["peak_bytes"] is None else f"{cost['peak_bytes'] / 2**20:.0f}",
        ]
        for name, cost in measured["optimizers"].items()
    ]
    headers = ["", "ms a step", "mean / SGD", "median", "worst", "state / weights", "peak MiB"]
    if not any(row[-1] for row in rows):
        headers, rows = headers[:-1], [row[:-1] for row in rows]
    return tabulate(rows, headers, disable_numparse=True)


def steps_figure(measured):
    """Mean and worst step of everything, one panel per network and interval."""
    use_book_style()
    count = max(len(m["optimizers"]) for m in measured)
    models = list(dict.fromkeys(m["configuration"]["model"] for m in measured))
    columns = max(sum(m["configuration"]["model"] == model for m in measured) for model in models)
    fig = page_figure(0.6 + len(models) * (0.75 + 0.21 * count))
    axes = fig.subplots(len(models), columns, squeeze=False)
    for ax in axes.flat:
        ax.set_visible(False)
    place = dict.fromkeys(models, 0)
    for one in measured:
        model, interval = (one["configuration"][name] for name in ("model", "interval"))
        ax = axes[models.index(model), place[model]]
        ax.set_visible(True)
        for y, (name, cost) in enumerate(one["optimizers"].items()):
            ours = name.split(",")[0]  # with options or without
            color = METHOD_STYLES[ours].color if ours in METHOD_STYLES else PEER_COLOR
            mean, worst = cost["mean_ratio"], cost["worst_ratio"]
            ends = [mean["median"], worst["median"]]
            ax.plot(ends, [y, y], color=color, linewidth=1, alpha=0.6)
            for part, marker, face in ((mean, "o", color), (worst, "|", color)):
                ax.plot([part["low"], part["high"]], [y, y], color=color, linewidth=3.5, alpha=0.45)
                ax.plot(part["median"], y, marker, color=color, markerfacecolor=face, markersize=7)
            ax.annotate(
                f"{mean['median']:.2f}",
                (1, y),
                xytext=(4, 0),
                textcoords="offset points",
                xycoords=("axes fraction", "data"),
                va="center",
                size=8,
                color=color,
            )
        names = list(one["optimizers"])
        first = place[model] == 0
        ax.set_yticks(range(len(names)), names if first else [""] * len(names), size=8)
        ax.set(
            xscale="log",
            ylim=(len(names) - 0.4, -0.6),
            title=f"{model}, interval {interval}",
        )
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        place[model] += 1
    fig.supxlabel(
        "times SGD's mean step. Dot and number: mean step; bar: worst step; band: repetitions",
        size=9,
    )
    return fig


def main(
    models: tuple[Literal[tuple(TINY)], ...] = ("mlp", "resnet20"),
    intervals: tuple[int, ...] = (10, 50),
    optimizers: tuple[Literal[OPTIMIZERS], ...] = OPTIMIZERS,
    peers: bool = True,
    cost: Cost = EXACT,
    repetitions: int = 3,
    steps: int = 30,
    batch_size: int = 128,
    device: Literal["cpu", "cuda"] = "cpu",
    threads: int | None = None,
    record: Path = RECORDS / "speed.json",
    figures: Path = FIGURES,
    smoke: bool = False,
):
    """Measure, and write record and figure.

    Args:
        models: mlp is 784-256-128-10.
        intervals: steps between refreshes.
        optimizers: beside the peers; SGD is measured in any case.
        peers: whether those of peers.txt run too.
        cost: of ours, which run with it, too, if it is given.
        repetitions: every one builds everything anew.
        steps: at least so many are timed per repetition, in whole intervals.
        batch_size: examples in a step.
        device: cpu or cuda.
        threads: torch's; default: as many as it takes.
        record: where the record goes.
        figures: the folder for the figure.
        smoke: everything tiny, to try the program out.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    device = torch.device(device)
    if smoke:
        intervals, repetitions, steps = (2,), min(repetitions, 2), 2
    content = {
        **header(device),
        "options": {n: v for n, v in vars(cost).items() if v != vars(EXACT)[n]},
        "smoke": smoke,
    }
    content |= {"repetitions": repetitions, "steps": [], "left_out": [], "peers": {}}
    start = time.perf_counter()
    run = other_packages.PEERS if peers else {}
    for model in models:
        sizes = {"batch_size": 8} | TINY[model] if smoke else {"batch_size": batch_size}
        for interval in intervals:
            configuration = Configuration(model=model, interval=interval, **sizes)
            one = measure(configuration, device, optimizers, run, cost, repetitions, steps)
            for name, why in one.pop("left_out").items():
                where = {"model": model, "interval": interval, "reason": why}
                content["left_out"].append({"name": name, **where})
            for name in run.keys() & one["optimizers"].keys():
                content["peers"][name] = other_packages.described(name)
            content["steps"].append(one)
            content["seconds"] = round(time.perf_counter() - start, 1)
            write_json(record, content)
            print(f"\n{model}, interval {interval}\n{steps_table(one)}", flush=True)
    figures.mkdir(parents=True, exist_ok=True)
    steps_figure(content["steps"]).savefig(figures / "step_cost.png")
    print(f"{content['seconds']} s; {record}")


if __name__ == "__main__":
    tyro.cli(main)
