"""A race: every optimizer of a preset, with several seeds, resumable at any point."""

import json
from pathlib import Path

from tekfac_edu.arguments import one_of
from tekfac_edu.experiments.configuration import OPTIMIZERS
from tekfac_edu.experiments.processes import processes
from tekfac_edu.experiments.training import train


def tuned_in(folder):
    """{optimizer: settings}: what `tune` has left in the folder of a race, if anything."""
    path = Path(folder) / "tuned.json"
    return json.loads(path.read_text()) if path.exists() else {}


def settings_of(preset, folder):
    """{optimizer: settings}: what was tuned in this folder, elsewhere where the preset starts."""
    return preset.starts | tuned_in(folder)


def race(preset, folder, optimizers=OPTIMIZERS, seeds=(0, 1, 2), **how):
    """Run what is not finished yet, seed by seed, so that an early end leaves a fair race.

    Parameters
    ----------
    preset : Preset.   folder : of the race; runs go into its folder `runs`.
    optimizers, seeds : which.
    how : passed on to `train` (data_folder, device, bar, tensorboard).

    Returns
    -------
    list of records
    """
    settings = settings_of(preset, folder)
    records = []
    with processes(how.get("device")):  # once for all runs: torchrun's cannot meet twice
        for seed in seeds:
            for optimizer in optimizers:
                one_of("optimizer", optimizer, OPTIMIZERS)
                configuration = preset.base.replace(
                    **settings[optimizer], optimizer=optimizer, seed=seed
                )
                records.append(
                    train(configuration, Path(folder) / "runs" / configuration.name, **how)
                )
    return records
