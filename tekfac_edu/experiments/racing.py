"""A race: every optimizer of a preset, with several seeds, resumable at any point."""

import json
from pathlib import Path

from tekfac_edu.arguments import one_of
from tekfac_edu.experiments.at_once import AtOnce
from tekfac_edu.experiments.methods import OPTIMIZERS


def tuned_in(folder):
    """{optimizer: settings}: what `tune` has left in the folder of a race, if anything."""
    path = Path(folder) / "tuned.json"
    return json.loads(path.read_text()) if path.exists() else {}


def settings_of(preset, folder):
    """{optimizer: settings}: what was tuned in this folder, elsewhere where the preset starts."""
    return preset.starts | tuned_in(folder)


def race(
    preset, folder, optimizers=OPTIMIZERS, seeds=(0, 1, 2), at_once=1, progress=None, **options
):
    """Run what is not finished yet, seed by seed, so that an early end leaves a fair race.

    Parameters
    ----------
    preset : Preset.   folder : of the race; runs go into its folder `runs`.
    optimizers, seeds : which.
    at_once : runs at a time; several have a process each, and no bar.
    progress : called with a line per run, unless None.
    options : passed on to `train` (data_folder, device, bar, tensorboard).

    Returns
    -------
    list of records
    """
    settings = settings_of(preset, folder)
    configurations = [
        preset.base.replace(**settings[optimizer], optimizer=optimizer, seed=seed)
        for seed in seeds
        for optimizer in (one_of("optimizer", name, OPTIMIZERS) for name in optimizers)
    ]

    def run(configuration):
        record = runs.train(configuration, Path(folder) / "runs" / configuration.name)
        if progress is not None:
            progress(f"{configuration.optimizer}, seed {configuration.seed}: {_ended(record)}")
        return record

    with AtOnce(at_once, **options) as runs:
        return runs.map(run, configurations)


def _ended(record):
    if record["status"] != "finished":
        return record["status"]
    last = record["epochs"][-1]
    return (
        f"training loss {last['train_loss']:.4g}, test {record['score']} {last['test_score']:.4g}"
    )
