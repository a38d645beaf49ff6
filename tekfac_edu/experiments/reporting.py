"""From records to tables and figures: epochs and seconds to given losses, and where it all ended.

    runs, trials = read_races(["benchmarks/records/cifar10_mini.json"])
    print(targets_table(runs, (1.2, 1.0)), final_table(runs), sep="\n\n")
    loss_figure(runs)

All runs handed in belong to one race: they differ in optimizer, its settings and seed alone.
"""

import math
import statistics
from pathlib import Path

from tabulate import tabulate

from tekfac_edu.arguments import one_of
from tekfac_edu.experiments.methods import KRONECKER, METHODS, OPTIMIZERS

NAMES = {name: method.label for name, method in METHODS.items()}
CLOCKS = {"seconds": "seconds", "cpu_seconds": "CPU seconds"}
MAY_DIFFER = {"optimizer", "lr", "damping", "weight_decay", "seed"}


def by_optimizer(runs):
    """{optimizer: its records, by seed}, in the order of OPTIMIZERS.

    Raises
    ------
    ValueError
        If the runs are none, or not of one race, or an optimizer was run twice with one seed.
    """
    if not runs:
        raise ValueError("there are no finished runs to report")
    first = runs[0]["configuration"]
    for run in runs:
        other = {
            name: value
            for name, value in run["configuration"].items()
            if name not in MAY_DIFFER and value != first[name]
        }
        if other:
            listed = ", ".join(
                f"{name}: {first[name]} and {value}" for name, value in other.items()
            )
            raise ValueError(f"these runs are not of one race ({listed}); report them one by one")
    grouped = {}
    for name in OPTIMIZERS:
        group = [run for run in runs if run["configuration"]["optimizer"] == name]
        seeds = [run["configuration"]["seed"] for run in group]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{name} has several runs with the same seed: report one setting only")
        if group:
            grouped[name] = sorted(group, key=lambda run: run["configuration"]["seed"])
    return grouped


def reached(run, target):
    """The first epoch, from 1, whose training loss is at most the target; None if there is none."""
    for number, epoch in enumerate(run["epochs"], 1):
        if epoch["train_loss"] is not None and epoch["train_loss"] <= target:
            return number
    return None


def targets_table(runs, targets, unit="epochs"):
    """How long to each training loss, in epochs or a clock's seconds: mean ± s.d. over the seeds.

    A cell says "2 of 3" where that many seeds got there at all.
    """
    one_of("unit", unit, ("epochs", *CLOCKS))
    rows = []
    for name, group in by_optimizer(runs).items():
        row = [NAMES[name]]
        for target in targets:
            arrived = [(run, reached(run, target)) for run in group]
            took = [
                epoch if unit == "epochs" else run["epochs"][epoch - 1][unit]
                for run, epoch in arrived
                if epoch
            ]
            everyone = len(took) == len(group)
            digits = 1 if unit == "epochs" else 0
            partly = f"{len(took)} of {len(group)}" if took else "–"
            row.append(spread(took, digits) if everyone else partly)
        rows.append(row)
    words = "epochs" if unit == "epochs" else CLOCKS[unit]
    return _table(rows, [f"{words} to", *(f"{target:g}" for target in targets)])


def final_table(runs, clock="seconds"):
    """Settings, and where each optimizer ended: mean ± s.d. over the seeds."""
    one_of("clock", clock, CLOCKS)
    rows = []
    for name, group in by_optimizer(runs).items():
        c = group[0]["configuration"]
        ended = [run["epochs"][-1] for run in group if run["status"] == "finished"]
        rows.append(
            [
                NAMES[name],
                f"{c['lr']:g}",
                f"{c['damping']:g}" if name in KRONECKER else "",
                *([f"{c['weight_decay']:g}"] if any_decay(runs) else []),
                f"{len(ended)} of {len(group)}",
                *(
                    spread([end[what] for end in ended], digits) if ended else "–"
                    for what, digits in (("train_loss", 3), ("test_score", 3), (clock, 0))
                ),
            ]
        )
    decay = ["decay"] if any_decay(runs) else []
    score = f"test {runs[0]['score']}"
    return _table(
        rows, ["", "lr", "damping", *decay, "ended", "training loss", score, CLOCKS[clock]]
    )


def any_decay(runs):
    """Whether a column for weight decay is worth its room."""
    return any(run["configuration"]["weight_decay"] for run in runs)


def trials_table(trials):
    """The tuning: how many trials each optimizer had, how many diverged, and the best of them."""
    rows = []
    for name in OPTIMIZERS:
        group = [trial for trial in trials if trial["configuration"]["optimizer"] == name]
        finite = [trial for trial in group if trial["status"] == "finished"]
        if not finite:
            continue
        best = min(finite, key=lambda trial: trial["epochs"][-1]["test_loss"])
        lrs = [trial["configuration"]["lr"] for trial in group]
        dampings = [trial["configuration"]["damping"] for trial in group]
        rows.append(
            [
                NAMES[name],
                len(group),
                len(group) - len(finite),
                f"{min(lrs):g} … {max(lrs):g}",
                f"{min(dampings):g} … {max(dampings):g}" if name in KRONECKER else "",
                f"{best['configuration']['lr']:g}",
                f"{best['configuration']['damping']:g}" if name in KRONECKER else "",
                f"{best['epochs'][-1]['test_loss']:.4g}",
            ]
        )
    headers = ["", "trials", "diverged", "lr tried", "damping tried", "lr", "damping", "loss"]
    return _table(rows, headers)


def spread(values, digits):
    """mean ± s.d. in so many digits after the point; more where the numbers are small."""
    mean = statistics.mean(values)
    if 0 < abs(mean) < 10 ** (1 - digits):
        digits += 1 if digits == 0 else 2
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def stamp(runs):
    """Device, versions, date and seeds of a race, in one line for its tables and figures."""
    devices = sorted({run["device"] for run in runs})
    torches = sorted({run["versions"]["torch"] for run in runs})
    dates = sorted({run["date"] for run in runs})
    seeds = sorted({run["configuration"]["seed"] for run in runs})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return (
        f"{', '.join(devices)}; torch {', '.join(torches)}; {when}; "
        f"seeds {', '.join(map(str, seeds))}"
    )


def loss_figure(runs, clock="seconds", height=3.1):
    """Training loss against epochs and against seconds in training; median and range of the seeds.

    Returns
    -------
    matplotlib Figure
    """
    from tekfac_edu.figures import subplots

    one_of("clock", clock, CLOCKS)
    fig, (left, right) = subplots(1, 2, height=height, sharey=True)
    for name, group in by_optimizer(runs).items():
        epochs, losses, times = _curves(group, "train_loss", clock)
        _draw(left, epochs, losses, name)
        _draw(right, [statistics.mean(time) for time in zip(*times, strict=True)], losses, name)
    left.set(yscale="log", xlabel="epoch", ylabel="training loss")
    right.set(xscale="log", xlabel=f"{CLOCKS[clock]} in training")
    left.legend(fontsize=8)
    return fig


def score_figure(runs, height=2.9):
    """Test accuracy, or reconstruction error, against epochs; median and range of the seeds."""
    from tekfac_edu.figures import end_labels, subplots

    fig, ax = subplots(height=height)
    for name, group in by_optimizer(runs).items():
        epochs, scores = _curves(group, "test_score")
        _draw(ax, epochs, scores, name)
    ax.set(xlabel="epoch", ylabel=f"test {runs[0]['score']}")
    end_labels(ax)
    return fig


def write_report(runs, trials, targets, into, clock="seconds"):
    """Tables as text and figures as PNG into a folder; returns the text.

    Raises
    ------
    OSError
        If the folder cannot be written to.
    """
    from tekfac_edu.figures import use_book_style

    use_book_style()
    into = Path(into)
    into.mkdir(parents=True, exist_ok=True)
    c = runs[0]["configuration"]
    parts = [
        f"{c['model']} on {c['dataset']}, {runs[0]['train_images']} training images, "
        f"{runs[0]['parameters']} parameters, {c['epochs']} epochs\n{stamp(runs)}",
        f"Until the training loss is at most\n{targets_table(runs, targets)}",
        targets_table(runs, targets, clock),
        final_table(runs, clock),
        *([f"Tuning, on a held-out tenth:\n{trials_table(trials)}"] if trials else []),
    ]
    text = "\n\n".join(parts) + "\n"
    (into / "tables.txt").write_text(text, encoding="utf-8")
    for name, figure in (("loss", loss_figure(runs, clock)), ("score", score_figure(runs))):
        figure.savefig(into / f"{name}.png", dpi=150)
    return text


def targets_of(runs, count=4):
    """Training losses that spread over what the race saw, for runs of no preset: round numbers."""
    ends = [run["epochs"][-1]["train_loss"] for run in runs if run["status"] == "finished"]
    starts = [run["epochs"][0]["train_loss"] for run in runs if run["status"] == "finished"]
    if not ends:
        raise ValueError("every run diverged: there is no loss to count epochs to")
    low, high = math.log(statistics.median(ends)), math.log(statistics.median(starts))
    between = [math.exp(high + (low - high) * (k + 1) / count) for k in range(count)]
    return tuple(dict.fromkeys(float(f"{target:.2g}") for target in between))


def _curves(group, *names):
    """Epochs, and per name one list of values a seed, up to the last epoch all have finite."""
    whole = 0
    for epochs in zip(*(run["epochs"] for run in group), strict=False):
        if any(epoch[name] is None for epoch in epochs for name in names):
            break
        whole += 1
    values = [[[e[name] for e in run["epochs"][:whole]] for run in group] for name in names]
    return list(range(1, whole + 1)), *values


def _draw(ax, x, runs, name):
    from tekfac_edu.figures import curves_with_bands

    if len(x):
        curves_with_bands(ax, x, runs, NAMES[name])


def _table(rows, headers):
    return tabulate(rows, headers, disable_numparse=True)
