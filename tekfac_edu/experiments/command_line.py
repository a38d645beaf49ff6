"""tekfac-edu train | tune | compare | report | bench: generated from typed functions by tyro."""

import sys
from pathlib import Path
from typing import Annotated, Literal

from tekfac_edu.experiments.configuration import OPTIMIZERS, Configuration
from tekfac_edu.experiments.presets import PRESETS

try:
    import tyro
except ImportError:
    sys.exit("tekfac-edu needs the packages of its experiments: pip install tekfac-edu[experiments]")

Race = Annotated[Literal[tuple(PRESETS)], tyro.conf.Positional]
Optimizers = tuple[Literal[OPTIMIZERS], ...]


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
    from tekfac_edu.experiments.training import train

    c = configuration
    folder = folder or Path("runs") / f"{c.model}-{c.dataset}" / c.name
    record = train(c, folder, _path(data_folder), device, tensorboard)
    if _writes() and record["epochs"]:
        last = record["epochs"][-1]
        print(
            f"{record['status']}: training loss {last['train_loss']}, test {record['score']} "
            f"{last['test_score']}, {last['seconds']:.1f} s in training; {folder / 'record.json'}"
        )


def tune(
    preset: Race,
    folder: Path | None = None,
    data_folder: Path | None = None,
    optimizers: Optimizers = OPTIMIZERS,
    trials: int = 12,
    device: Literal["cpu", "cuda"] | None = None,
):
    """Search each optimizer's settings on a held-out part, with the same number of trials.

    Args:
        preset: the race.
        folder: default: runs/PRESET.
        data_folder: Parquet files of the data set; default: download once.
        optimizers: which of the six.
        trials: runs for each.
        device: default: a GPU if there is one.
    """
    from tekfac_edu.experiments.tuning import tune

    how = {"data_folder": _path(data_folder), "device": device}
    tune(PRESETS[preset], _folder(folder, preset), optimizers, trials, _say, **how)


def compare(
    preset: Race,
    folder: Path | None = None,
    data_folder: Path | None = None,
    optimizers: Optimizers = OPTIMIZERS,
    seeds: tuple[int, ...] = (0, 1, 2),
    device: Literal["cpu", "cuda"] | None = None,
):
    """Every optimizer with every seed; what is finished is skipped, what was stopped continues.

    Args:
        preset: the race.
        folder: default: runs/PRESET. Settings tuned there are used, else the preset's own.
        data_folder: Parquet files of the data set; default: download once.
        optimizers: which of the six.
        seeds: of the runs.
        device: default: a GPU if there is one.
    """
    from tekfac_edu.experiments.racing import race

    folder = _folder(folder, preset)
    how = {"data_folder": _path(data_folder), "device": device}
    race(PRESETS[preset], folder, optimizers, seeds, **how)
    _say(f"all runs are finished; their tables and figures: tekfac-edu report {folder}")


def main():
    """What the command tekfac-edu calls."""
    from tekfac_edu.experiments.training import Interrupted

    commands = {"train": train, "tune": tune, "compare": compare}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="tekfac-edu", description=__doc__)
    except Interrupted as stopped:
        sys.exit(f"tekfac-edu: {stopped}")
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"tekfac-edu: {error}")


def _folder(folder, preset):
    return folder or Path("runs") / preset


def _path(folder):
    return None if folder is None else str(folder)


def _writes():
    """Whether this is the only process, or the first."""
    import os

    return os.environ.get("RANK", "0") == "0"


def _say(text):
    if _writes():
        print(text, flush=True)
