"""How the cost of a TEKFAC step grows, measured and counted.

    python -m benchmarks.growth --threads 1                 (minutes)

TEKFAC's step and refresh against width, batch, image and depth, with the exponent of a power law
beside the one that counting multiplications predicts; and the counts of the cost model in
benchmarks/README.md. The record is records/growth.json, the figure figures/growth.png.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from matplotlib.ticker import NullLocator
from tabulate import tabulate
from torch import nn

from benchmarks import FIGURES, RECORDS
from tekfac_edu import models as networks
from tekfac_edu.experiments.building import build_optimizer
from tekfac_edu.experiments.configuration import Configuration
from tekfac_edu.experiments.records import header, write_json
from tekfac_edu.experiments.step_cost import TrainingStep, take_turns
from tekfac_edu.experiments.tasks import Classification
from tekfac_edu.figures import method_style, page_figure, use_book_style
from tekfac_edu.optim.eigenvalues import projecting_first_is_cheaper
from tekfac_edu.optim.sampling import coarsest_steps

TYPICAL = 10  # the interval whose mean step is reported
NETWORKS = {
    "mlp": (lambda: networks.mlp((784, 256, 128, 10)), (128, 784)),
    "resnet20": (networks.resnet20, (128, 3, 32, 32)),
    "vgg16": (networks.vgg16, (128, 3, 32, 32)),
}
CHEAPER = {"rows": 2, "examples": 32}  # factor_rows, eigenvalue_examples


@dataclass(frozen=True)
class Axis:
    """What grows: its sizes, the width of what does not grow, and the same for trying out.

    `build(size, width)` is (model, shape of the batch, classes).
    """

    label: str
    sizes: tuple[int, ...]
    width: int | None
    tiny: tuple[int, ...]
    tiny_width: int | None
    build: Callable


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


def multiplications(layers, N, eigh_cost, rows=None, examples=None):
    """Those of TEKFAC's parts, for one batch of N.

    Parameters
    ----------
    layers : of `layer_sizes`, of square images.
    eigh_cost : multiplications of an eigendecomposition per d³.
    rows, examples : the costs factor_rows and eigenvalue_examples; None: the whole batch.

    Returns
    -------
    dict: network (forward and backward), update, factors, bases, eigenvalues (T_RE), moving (of
    the old eigenvalues into the new basis).
    """
    parts = ("network", "update", "factors", "bases", "eigenvalues", "moving")
    total = dict.fromkeys(parts, 0)
    for T, d_in, d_out in layers:
        both = d_out**2 * d_in + d_out * d_in**2
        side = math.isqrt(T)
        share = 1 if rows is None else math.prod(coarsest_steps(side, side, rows * d_in / N))
        n = N if examples is None else examples
        total["network"] += 3 * N * T * d_in * d_out
        total["update"] += 2 * both
        total["factors"] += N * T // share * (d_in**2 + d_out**2)
        total["bases"] += eigh_cost * (d_in**3 + d_out**3)
        total["moving"] += d_in**3 + d_out**3 + both
        if T == 1 or projecting_first_is_cheaper(T, d_out):
            total["eigenvalues"] += n * T * (d_in**2 + d_out**2 + d_in * d_out)
        else:
            total["eigenvalues"] += n * (T * (d_out**2 + d_in * d_out) + d_out * d_in**2)
    return total


def counts_of_networks(eigh_cost):
    """{network: {"exact", "cheaper": multiplications}}, for batches of 128."""
    counts = {}
    for name, (build, shape) in NETWORKS.items():
        layers = layer_sizes(build(), shape)
        counts[name] = {
            "exact": multiplications(layers, shape[0], eigh_cost),
            "cheaper": multiplications(layers, shape[0], eigh_cost, **CHEAPER),
        }
    return counts


def counts_table(counts):
    """In units of 10⁹."""
    columns = {
        f"{name}, {kind}": parts for name, kinds in counts.items() for kind, parts in kinds.items()
    }
    rows = [
        [part, *(f"{parts[part] / 1e9:.3g}" for parts in columns.values())]
        for part in counts["mlp"]["exact"]
    ]
    headers = ["10⁹ multiplications", *columns]
    return tabulate(rows, headers, disable_numparse=True)


def predicted(layers, N, eigh_cost):
    """Multiplications of a plain step, of a refresh step, and of the mean at interval TYPICAL."""
    count = multiplications(layers, N, eigh_cost)
    plain = count["network"] + count["update"]
    return with_mean(plain, sum(count.values()))


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


def measure_growth(axis, device, eigh_cost, tiny=False):
    """TEKFAC along one axis, for the record.

    Of plain and refresh steps the fastest counts, of 4 and 2.

    Returns
    -------
    dict: label, sizes, and per kind of step (plain, refresh, mean) seconds, sgd_seconds,
    multiplications, and the exponents: measured, predicted.
    """
    interval = 2 if tiny else 3
    sizes, width = (axis.tiny, axis.tiny_width) if tiny else (axis.sizes, axis.width)
    kinds = ("plain", "refresh", "mean")
    seconds, counts = ({kind: [] for kind in kinds} for _ in range(2))
    sgd_seconds = []
    for size in sizes:
        torch.manual_seed(0)
        steps = {}
        for name in ("sgd", "tekfac"):
            model, shape, classes = axis.build(size, width)
            model.to(device)
            if name == "sgd":
                optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
            else:
                optimizer = build_optimizer(Configuration(interval=interval, warmup=0), model)
            steps[name] = TrainingStep(model, optimizer, Classification().loss)
        counted = predicted(layer_sizes(model, shape), shape[0], eigh_cost)
        draw = torch.Generator().manual_seed(0)
        x = torch.rand(shape, generator=draw).to(device)
        y = torch.randint(classes, shape[:1], generator=draw).to(device)
        times, _ = take_turns(steps, x, y, 2 * interval, untimed=1)
        refreshes = times["tekfac"][interval::interval]
        plain = [t for i, t in enumerate(times["tekfac"]) if i % interval]
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


def main(
    device: Literal["cpu", "cuda"] = "cpu",
    threads: int | None = None,
    record: Path = RECORDS / "growth.json",
    figures: Path = FIGURES,
    smoke: bool = False,
):
    """Count and measure, and write record and figure.

    Args:
        device: cpu or cuda.
        threads: torch's; default: as many as it takes.
        record: where the record goes.
        figures: the folder for the figure.
        smoke: everything tiny, to try the program out.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    device = torch.device(device)
    cost = measured_eigh_cost(device, 32 if smoke else 512)
    content = {
        **header(device),
        "eigh_cost": cost,
        "counts": counts_of_networks(cost),
        "interval": TYPICAL,
        "axes": {name: measure_growth(axis, device, cost, smoke) for name, axis in AXES.items()},
    }
    write_json(record, content)
    figures.mkdir(parents=True, exist_ok=True)
    growth_figure(content["axes"]).savefig(figures / "growth.png")
    print(f"an eigendecomposition costs {cost:.1f} d³\n{counts_table(content['counts'])}")
    print(f"\n{growth_table(content['axes'])}\n{record}")


if __name__ == "__main__":
    tyro.cli(main)
