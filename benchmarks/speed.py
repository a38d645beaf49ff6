"""What a step costs, ours and other packages', as ratios to SGD, and how the cost grows.

    python benchmarks/speed.py                              (about an hour on two cores)
    python benchmarks/speed.py --parts growth               (minutes)
    python benchmarks/speed.py --device cuda --models resnet20 vgg16 --record records/speed_gpu.json

1. steps     all optimizers in turn in one process: mean, median and worst step, state, memory; the
             median of whole repetitions, with lowest and highest. Statistics, bases and eigenvalues
             are refreshed every `interval` steps, of peers whatever they refresh.
2. growth    TEKFAC's step and refresh against width, batch, image and depth, with the exponent of a
             power law beside the one that counting multiplications predicts

Peers are the packages in peers.txt; one that is not installed, or fails, is left out, with the
reason. The record is records/speed.json, the figures figures/step_cost.png and figures/growth.png.
"""

import datetime
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator
from tabulate import tabulate
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import peers as other_packages

from tekfac_edu import models as networks
from tekfac_edu.experiments.building import METHODS, build_model
from tekfac_edu.experiments.configuration import KRONECKER, OPTIMIZERS, Configuration
from tekfac_edu.experiments.records import FORMAT, circumstances, write_json
from tekfac_edu.experiments.reporting import NAMES
from tekfac_edu.experiments.step_cost import (
    TrainingStep,
    blank_images,
    contestant,
    random_batch,
    take_turns,
    time_steps,
)
from tekfac_edu.experiments.tasks import task_of
from tekfac_edu.figures import METHOD_STYLES, method_style, page_figure, use_book_style
from tekfac_edu.optim.rescaling import projecting_first_is_cheaper

HERE = Path(__file__).parent
PARTS = ("steps", "growth")
UNTIMED = 3  # steps before the timed ones: buffers exist then, and each interval has its refresh
MEASURED = ("mean", "median", "worst", "mean_ratio", "median_ratio", "worst_ratio")
TINY = {"mlp": {"widths": (8,)}, "resnet20": {"width": 2}, "vgg16": {"width": 2}}
TYPICAL = 10  # the interval whose mean step the growth is told of


# ---------------------------------------------------------------------------------- step cost


def contestants_of(configuration, images, device, optimizers, peers, options):
    """({name: step}, {name: exception}): SGD first, then the others, then the peers.

    Parameters
    ----------
    configuration : Configuration, for all of them. peers: {name: function}, as in `peers.py`.
    options : of the constructors of ours; with any, each of ours runs both without and with them.
    """
    steps, failed = {}, {}
    for name in ("sgd", *(name for name in optimizers if name != "sgd")):
        steps[NAMES[name]] = contestant(configuration.replace(optimizer=name), images, device)
        if options and name in KRONECKER:
            model = build_model(configuration, images).to(device)
            optimizer = ours(name, model, configuration.interval, configuration.lr, options)
            loss = task_of(configuration).loss
            steps[f"{NAMES[name]}, options"] = TrainingStep(model, optimizer, loss)
    for name, make in peers.items():
        model = build_model(configuration, images).to(device)
        try:
            made = make(model, configuration.interval)
        except Exception as error:
            failed[name] = error
            continue
        loss = task_of(configuration).loss
        steps[name] = made if callable(made) else TrainingStep(model, made, loss)
    return steps, failed


def ours(name, model, interval, lr=0.1, options=None):
    """One of the four, refreshing everything at once; options: beside or instead of that."""
    settings = {
        "lr_scale": "sgd",
        "factor_interval": interval,
        "eigen_interval": interval,
        "scale_interval": interval,
        "warmup_steps": 0,
    }
    return METHODS[name](model, lr, **settings | (options or {}))


def measure(configuration, device, optimizers, peers, options, repetitions, steps):
    """One network and one interval, for the record.

    Returns
    -------
    dict: configuration, timed_steps and untimed_steps of a repetition, "optimizers": {name: each of
    MEASURED as {median, low, high} over the repetitions, and the bytes}, "left_out": {name: why}.
    """
    configuration = configuration.replace(warmup_steps=0)
    images = blank_images((1, 28, 28) if configuration.model == "mlp" else (3, 32, 32))
    interval = configuration.interval
    timed = interval * math.ceil(steps / interval)
    x, y = random_batch(configuration, images, device)
    rounds, left_out = [], {}
    for _ in range(repetitions):
        wanted = {name: make for name, make in peers.items() if name not in left_out}
        running, failed = contestants_of(configuration, images, device, optimizers, wanted, options)
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

    def told(cost, key, digits):
        low, high = cost[key]["low"], cost[key]["high"]
        return f"{cost[key]['median']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    rows = [
        [
            name,
            f"{1e3 * cost['mean']['median']:.2f}",
            told(cost, "mean_ratio", 2),
            f"{cost['median_ratio']['median']:.2f}",
            told(cost, "worst_ratio", 1),
            f"{cost['state_bytes'] / cost['parameter_bytes']:.1f}",
            "" if cost["peak_bytes"] is None else f"{cost['peak_bytes'] / 2**20:.0f}",
        ]
        for name, cost in measured["optimizers"].items()
    ]
    headers = ["", "ms a step", "mean / SGD", "median", "worst", "state / weights", "peak MiB"]
    if not any(row[-1] for row in rows):
        headers, rows = headers[:-1], [row[:-1] for row in rows]
    return tabulate(rows, headers, disable_numparse=True)


# ------------------------------------------------------------------------------------- growth


@dataclass(frozen=True)
class Axis:
    """What grows: its sizes, the width of what does not grow, and the same for trying out.

    `of(size, width)` is (model, shape of the batch, classes).
    """

    label: str
    sizes: tuple[int, ...]
    width: int | None
    tiny: tuple[int, ...]
    tiny_width: int | None
    of: Callable


AXES = {
    "mlp_width": Axis(
        "width of a square MLP (4 layers, batch 128)",
        (64, 128, 256, 512, 1024),
        None,
        (4, 8, 16),
        None,
        lambda size, _: (networks.mlp((size,) * 5), (128, size), size),
    ),
    "mlp_depth": Axis(
        "layers of an MLP (width 256, batch 128)",
        (2, 4, 8, 16),
        256,
        (1, 2, 3),
        8,
        lambda size, width: (networks.mlp((width,) * (size + 1)), (128, width), width),
    ),
    "resnet20_width": Axis(
        "width of ResNet20 (32×32, batch 32)",
        (4, 8, 16, 32),
        None,
        (1, 2, 3),
        None,
        lambda size, _: (networks.resnet20(width=size), (32, 3, 32, 32), 10),
    ),
    "batch": Axis(
        "batch (ResNet20, width 8, 32×32)",
        (32, 64, 128, 256, 512),
        8,
        (1, 2, 3),
        1,
        lambda size, width: (networks.resnet20(width=width), (size, 3, 32, 32), 10),
    ),
    "image_side": Axis(
        "side of the image (ResNet20, width 8, batch 32)",
        (16, 24, 32, 48, 64),
        8,
        (8, 10, 12),
        1,
        lambda size, width: (networks.resnet20(width=width), (32, 3, size, size), 10),
    ),
}


def layer_sizes(model, shape):
    """(T, d_in, d_out) of every Linear and Conv2d: positions, inputs with the bias, outputs."""
    found, hooks = [], []

    def note(module, inputs, output):
        bias = module.bias is not None
        if isinstance(module, nn.Linear):
            found.append((1, module.in_features + bias, module.out_features))
        else:
            d_in = module.weight[0].numel() + bias
            found.append((output.shape[2:].numel(), d_in, module.out_channels))

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            hooks.append(module.register_forward_hook(note))
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(2, *shape[1:], device=device))
    finally:
        model.train()
        for hook in hooks:
            hook.remove()
    return found


def multiplications(layers, N, eigh_cost):
    """Those of TEKFAC's parts, for one batch of N; every Fisher statistic from the whole of it.

    Parameters
    ----------
    layers : of `layer_sizes`. eigh_cost: multiplications of an eigendecomposition per d³.

    Returns
    -------
    dict: network (forward and backward), update, factors, bases, eigenvalues (T_RE).
    """
    total = dict.fromkeys(("network", "update", "factors", "bases", "eigenvalues"), 0)
    for T, d_in, d_out in layers:
        both = d_out**2 * d_in + d_out * d_in**2
        total["network"] += 3 * N * T * d_in * d_out
        total["update"] += 2 * both
        total["factors"] += N * T * (d_in**2 + d_out**2)
        total["bases"] += eigh_cost * (d_in**3 + d_out**3)
        if T == 1:
            total["eigenvalues"] += N * (d_in**2 + d_out**2 + d_in * d_out)
        elif projecting_first_is_cheaper(T, d_out):
            total["eigenvalues"] += N * T * (d_in**2 + d_out**2 + d_in * d_out)
        else:
            total["eigenvalues"] += N * (T * (d_out**2 + d_in * d_out) + d_out * d_in**2)
    return total


def predicted(layers, N, eigh_cost):
    """Multiplications of a plain step, of a refresh step, and of the mean at interval TYPICAL."""
    count = multiplications(layers, N, eigh_cost)
    plain = count["network"] + count["update"]
    return with_mean(plain, plain + count["factors"] + count["bases"] + count["eigenvalues"])


def with_mean(plain, refresh):
    """The two, and the mean step at interval TYPICAL."""
    return {"plain": plain, "refresh": refresh, "mean": plain + (refresh - plain) / TYPICAL}


def exponent(sizes, values):
    """Of the power law through the upper half of the sizes (least squares of the logarithms)."""
    half = len(sizes) // 2
    return float(np.polyfit(np.log(sizes[half:]), np.log(values[half:]), 1)[0])


def measured_eigh_cost(device, order):
    """Time of an eigendecomposition in products of matrices of the same order."""
    draw = torch.Generator().manual_seed(0)
    A = torch.randn(order, order, generator=draw).to(device)
    A = A @ A.T

    def seconds(function):
        best = math.inf
        for _ in range(5):
            start = time.perf_counter()
            function(A)
            if A.is_cuda:
                torch.cuda.synchronize(A.device)
            best = min(best, time.perf_counter() - start)
        return best

    return seconds(torch.linalg.eigh) / seconds(lambda A: A @ A)


def measure_growth(axis, device, options, eigh_cost, tiny=False):
    """TEKFAC along one axis, for the record.

    Of plain and refresh steps the fastest is told, of 4 and 2. A staggered refresh is done at once
    here: its cost is the question, not when it falls due.

    Returns
    -------
    dict: label, sizes, and per kind of step (plain, refresh, mean) seconds, sgd_seconds,
    multiplications, and the exponents: measured, predicted.
    """
    interval = 2 if tiny else 3
    options = {name: value for name, value in options.items() if name != "stagger"}
    sizes, width = (axis.tiny, axis.tiny_width) if tiny else (axis.sizes, axis.width)
    kinds = ("plain", "refresh", "mean")
    seconds, counts = ({kind: [] for kind in kinds} for _ in range(2))
    sgd_seconds = []
    for size in sizes:
        torch.manual_seed(0)
        steps = {}
        for name in ("sgd", "tekfac"):
            model, shape, classes = axis.of(size, width)
            model.to(device)
            if name == "sgd":
                optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
            else:
                optimizer = ours("tekfac", model, interval, options=options)
            steps[name] = TrainingStep(model, optimizer, task_of(Configuration()).loss)
        counted = predicted(layer_sizes(model, shape), shape[0], eigh_cost)
        draw = torch.Generator().manual_seed(0)
        x = torch.rand(shape, generator=draw).to(device)
        y = torch.randint(classes, shape[:1], generator=draw).to(device)
        times, _ = take_turns(steps, x, y, 2 * interval, 1)
        refreshes = times["tekfac"][interval - 1 :: interval]
        plain = [t for i, t in enumerate(times["tekfac"]) if (i + 1) % interval]
        timed = with_mean(min(plain), min(refreshes))
        sgd_seconds.append(min(times["sgd"]))
        for kind in kinds:
            seconds[kind].append(timed[kind])
            counts[kind].append(counted[kind])
    return {
        "label": axis.label,
        "sizes": sizes,
        "seconds": seconds,
        "sgd_seconds": sgd_seconds,
        "multiplications": counts,
        "measured": {kind: exponent(sizes, seconds[kind]) for kind in kinds},
        "predicted": {kind: exponent(sizes, counts[kind]) for kind in kinds},
    }


def growth_table(growth):
    """{axis: result of `measure_growth`} as text."""
    rows = []
    for grown in growth.values():
        sizes, seconds = grown["sizes"], grown["seconds"]
        for kind in ("plain", "refresh", "mean"):
            rows.append(
                [
                    grown["label"] if kind == "plain" else "",
                    kind,
                    f"{sizes[0]} … {sizes[-1]}",
                    f"{1e3 * seconds[kind][0]:.1f} … {1e3 * seconds[kind][-1]:.1f}",
                    f"{grown['measured'][kind]:.2f}",
                    f"{grown['predicted'][kind]:.2f}",
                ]
            )
    headers = ["", "step", "from … to", "ms", "exponent", "predicted"]
    return tabulate(rows, headers, disable_numparse=True)


# ------------------------------------------------------------------------------------ figures

PEER_COLOR = "#0F7F5E"


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


def growth_figure(growth):
    """Seconds against every axis, measured and as counted, with the exponents."""
    use_book_style()
    rows = math.ceil(len(growth) / 2)
    fig = page_figure(0.3 + 2.6 * rows)
    axes = fig.subplots(rows, 2, squeeze=False)
    styles = {"refresh": ("TKFAC", "refresh"), "mean": ("TEKFAC", f"mean, interval {TYPICAL}")}
    styles["plain"] = ("EKFAC", "plain")
    for ax, grown in zip(axes.flat, growth.values(), strict=False):
        sizes = grown["sizes"]
        for kind, (style, label) in styles.items():
            ms, counts = 1e3 * np.array(grown["seconds"][kind]), grown["multiplications"][kind]
            line = method_style(style).line()
            slopes = f"{grown['measured'][kind]:.1f} (counted {grown['predicted'][kind]:.1f})"
            ax.plot(sizes, ms, label=f"{label}: {slopes}", **line | {"linestyle": "-"})
            scaled = ms[-1] * np.array(counts, float) / counts[-1]
            half = len(sizes) // 2
            ax.plot(sizes[half:], scaled[half:], color=line["color"], linestyle=":", linewidth=1.4)
        sgd = 1e3 * np.array(grown["sgd_seconds"])
        ax.plot(sizes, sgd, label="SGD", **method_style("SGD").line() | {"markersize": 4})
        ax.set(xscale="log", yscale="log", xlabel=grown["label"])
        ax.set_ylim(top=ax.get_ylim()[1] * 12)  # room for the legend
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.legend(loc="upper left", fontsize=7.5, labelspacing=0.25, handlelength=2)
    for ax in axes[:, 0]:
        ax.set_ylabel("ms a step")
    for ax in list(axes.flat)[len(growth) :]:
        ax.axis("off")
        ax.text(
            0.02,
            0.7,
            "Exponents: of a power law through the upper half\nof the sizes. Dotted: "
            "multiplications as counted,\nthrough the last point.",
            transform=ax.transAxes,
            size=8.5,
            va="top",
        )
    return fig


# --------------------------------------------------------------------------------------- main


def main(
    parts: tuple[Literal[PARTS], ...] = PARTS,
    models: tuple[Literal["mlp", "resnet20", "vgg16"], ...] = ("mlp", "resnet20"),
    intervals: tuple[int, ...] = (10, 50),
    optimizers: tuple[Literal[OPTIMIZERS], ...] = OPTIMIZERS,
    peers: bool = True,
    options: str = "{}",
    repetitions: int = 3,
    steps: int = 30,
    batch_size: int = 128,
    device: Literal["cpu", "cuda"] = "cpu",
    threads: int | None = None,
    record: Path = HERE / "records" / "speed.json",
    figures: Path = HERE / "figures",
    smoke: bool = False,
):
    """Measure, and write record and figures.

    Args:
        parts: which, in this order.
        models: of part 1; mlp is 784-256-128-10.
        intervals: steps between refreshes, of part 1.
        optimizers: of part 1, beside the peers; SGD is measured in any case.
        peers: whether those of peers.txt run too.
        options: of the constructors of ours, as JSON, e.g. '{"stagger": true}'.
        repetitions: of part 1; every one builds everything anew.
        steps: at least so many are timed per repetition, in whole intervals.
        batch_size: of part 1.
        device: cpu or cuda.
        threads: torch's; default: as many as it takes.
        record: where the record goes.
        figures: the folder for the figures.
        smoke: everything tiny, to try the program out.
    """
    chosen = json.loads(options)
    if not isinstance(chosen, dict):
        sys.exit(f"--options must be a JSON object, like '{{\"stagger\": true}}'; got {options}")
    if threads is not None:
        torch.set_num_threads(threads)
    device = torch.device(device)
    if smoke:
        intervals, repetitions, steps = (2,), min(repetitions, 2), 2
    content = {
        "format": FORMAT,
        **circumstances(device),
        "command": shlex.join(["python", "benchmarks/speed.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "options": chosen,
        "smoke": smoke,
        "seconds": {},
    }
    figures.mkdir(parents=True, exist_ok=True)
    for part in parts:
        start = time.perf_counter()
        if part == "steps":
            content |= {"repetitions": repetitions, "steps": [], "left_out": [], "peers": {}}
            run = other_packages.PEERS if peers else {}
            for model in models:
                sizes = {"batch_size": 8} | TINY[model] if smoke else {"batch_size": batch_size}
                for interval in intervals:
                    one = measure(
                        Configuration(model=model, interval=interval, **sizes),
                        device,
                        optimizers,
                        run,
                        chosen,
                        repetitions,
                        steps,
                    )
                    for name, why in one.pop("left_out").items():
                        where = {"model": model, "interval": interval, "reason": why}
                        content["left_out"].append({"name": name, **where})
                    for name in run.keys() & one["optimizers"].keys():
                        content["peers"][name] = other_packages.described(name)
                    content["steps"].append(one)
                    print(f"\n{model}, interval {interval}\n{steps_table(one)}", flush=True)
                    write_json(record, content)
            steps_figure(content["steps"]).savefig(figures / "step_cost.png")
        else:
            cost = measured_eigh_cost(device, 32 if smoke else 512)
            content["growth"] = {"interval": TYPICAL, "eigh_cost": cost, "axes": {}}
            for name, axis in AXES.items():
                grown = measure_growth(axis, device, chosen, cost, smoke)
                content["growth"]["axes"][name] = grown
            print(f"\n{growth_table(content['growth']['axes'])}", flush=True)
            growth_figure(content["growth"]["axes"]).savefig(figures / "growth.png")
        content["seconds"][part] = round(time.perf_counter() - start, 1)
        write_json(record, content)
        print(f"{part}: {content['seconds'][part]} s; {record}", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
