"""tekfac-edu train | tune | compare | report | bench: generated from typed functions by tyro."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from tekfac_edu.experiments.configuration import Configuration, Model, Optimizer
from tekfac_edu.experiments.methods import OPTIMIZERS
from tekfac_edu.experiments.networks import NETWORKS
from tekfac_edu.experiments.presets import PRESETS
from tekfac_edu.experiments.processes import is_first, processes
from tekfac_edu.experiments.records import read_races, write_json, write_race
from tekfac_edu.experiments.reporting import targets_of, write_report
from tekfac_edu.experiments.step_cost import blank_images, measure_steps, steps_table

try:
    import tyro

    from tekfac_edu.experiments import racing, training, tuning
except ImportError as missing:
    sys.exit(f"tekfac-edu needs {missing.name}: pip install tekfac-edu[experiments]")

if TYPE_CHECKING:
    Race: TypeAlias = str
else:
    Race = Annotated[Literal[tuple(PRESETS)], tyro.conf.Positional]


def train(
    configuration: Annotated[Configuration, tyro.conf.arg(name="")],
    folder: Path | None = None,
    data_folder: Path | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    tensorboard: bool = True,
):
    """One run: progress, checkpoints, a record. The same command continues a run that was stopped.

    Args:
        configuration: what is trained, on what, how.
        folder: of this run; default: runs/MODEL-DATASET/OPTIMIZER-lr...
        data_folder: Parquet files of the data set; default: download once.
        device: default: a GPU if there is one.
        tensorboard: write scalars for TensorBoard into the folder.
    """
    c = configuration
    folder = folder or Path("runs") / f"{c.model}-{c.dataset}" / c.name
    record = training.train(c, folder, _path(data_folder), device, tensorboard)
    if is_first() and record["epochs"]:
        last = record["epochs"][-1]
        print(
            f"{record['status']}: training loss {last['train_loss']}, test {record['score']} "
            f"{last['test_score']}, {last['seconds']:.1f} s in training; {folder / 'record.json'}"
        )


def tune(
    preset: Race,
    folder: Path | None = None,
    data_folder: Path | None = None,
    optimizers: tuple[Optimizer, ...] = OPTIMIZERS,
    trials: int = 12,
    device: Literal["cpu", "cuda"] | None = None,
    at_once: int = 1,
):
    """Search each optimizer's settings on a held-out part, with the same number of trials.

    Args:
        preset: the race.
        folder: default: runs/PRESET.
        data_folder: Parquet files of the data set; default: download once.
        optimizers: which of the six.
        trials: runs for each.
        device: default: a GPU if there is one.
        at_once: runs side by side on one device; pays on a GPU that one run does not fill.
    """
    options = {"data_folder": _path(data_folder), "device": device}
    folder = _folder(folder, preset)
    tuning.tune(PRESETS[preset], folder, optimizers, trials, _say, at_once, **options)


def compare(
    preset: Race,
    folder: Path | None = None,
    data_folder: Path | None = None,
    optimizers: tuple[Optimizer, ...] = OPTIMIZERS,
    seeds: tuple[int, ...] = (0, 1, 2),
    device: Literal["cpu", "cuda"] | None = None,
    at_once: int = 1,
):
    """Every optimizer with every seed; what is finished is skipped, what was stopped continues.

    Args:
        preset: the race.
        folder: default: runs/PRESET. Settings tuned there are used, else the preset's own.
        data_folder: Parquet files of the data set; default: download once.
        optimizers: which of the six.
        seeds: of the runs.
        device: default: a GPU if there is one.
        at_once: runs side by side on one device; pays on a GPU that one run does not fill.
    """
    folder = _folder(folder, preset)
    options = {"data_folder": _path(data_folder), "device": device}
    _say(f"{preset}: {PRESETS[preset].about}")
    racing.race(PRESETS[preset], folder, optimizers, seeds, at_once, _say, **options)
    targets = " ".join(f"{target:g}" for target in PRESETS[preset].targets)
    _say("all runs are finished; their tables and figures:")
    _say(f"tekfac-edu report {folder} --targets {targets}")


def report(
    records: Annotated[tuple[Path, ...], tyro.conf.Positional],
    into: Path = Path("report"),
    targets: tuple[float, ...] | None = None,
    clock: Literal["seconds", "cpu_seconds"] = "seconds",
    save: Path | None = None,
):
    """Tables with mean ± s.d., epochs and seconds to target losses, and figures.

    Args:
        records: folders of races or runs, or files saved before.
        into: folder for tables.txt, loss.png and score.png.
        targets: training losses to which epochs and seconds are counted; default: spread evenly.
        clock: which seconds; cpu_seconds on a machine that others use, too.
        save: also write all records into this one file, small enough to share.
    """
    runs, trials = read_races(records)
    if not runs:
        raise ValueError(f"no finished runs in {', '.join(map(str, records))}")
    print(write_report(runs, trials, targets or targets_of(runs), into, clock))
    if save is not None:
        write_race(save, runs, trials)
        print(f"{len(runs)} runs and {len(trials)} trials: {save}")
    print(f"figures: {into / 'loss.png'}, {into / 'score.png'}")


def bench(
    model: Model = "resnet20",
    optimizers: tuple[Optimizer, ...] = OPTIMIZERS,
    interval: int = 10,
    intervals: int = 3,
    batch_size: int = 128,
    width: int | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    into: Path | None = None,
):
    """Step time and memory of every optimizer, side by side, as ratios to SGD.

    Args:
        model: dense ones on 28×28 pixels, convolutional ones on 32×32 in colour.
        optimizers: which of the six.
        interval: steps between refreshes.
        intervals: how many whole intervals are timed, after one that is not.
        batch_size: examples in a step.
        width: channels of the first stage, of convolutional ones.
        device: default: a GPU if there is one.
        into: also write the measurements into this JSON file.
    """
    images = blank_images(NETWORKS[model].image)
    configuration = Configuration(
        model=model, interval=interval, batch_size=batch_size, width=width
    )
    with processes(device) as here:
        measured = measure_steps(configuration, images, here.device, optimizers, intervals)
    print(f"{model}, batch {batch_size}, interval {interval}; {measured['device']}")
    print(steps_table(measured))
    if into is not None:
        write_json(into, measured)


def main():
    """What the command tekfac-edu calls."""
    commands = {"train": train, "tune": tune, "compare": compare, "report": report}
    commands |= {"bench": bench}
    try:
        try:
            tyro.extras.subcommand_cli_from_dict(commands, prog="tekfac-edu", description=__doc__)
        finally:
            sys.stdout.flush()
    except training.Interrupted as stopped:
        sys.exit(f"tekfac-edu: {stopped}")
    except KeyboardInterrupt:
        print(
            "tekfac-edu: stopped at once; the same command continues from what was saved before",
            file=sys.stderr,
        )
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has gone, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"tekfac-edu: {error}")


def _folder(folder, preset):
    return folder or Path("runs") / preset


def _path(folder):
    return None if folder is None else str(folder)


def _say(text):
    if is_first():
        print(text, flush=True)


if __name__ == "__main__":
    main()
