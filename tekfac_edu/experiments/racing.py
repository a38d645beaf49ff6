"""A race: every optimizer of a preset, with several seeds, resumable at any point."""

import json
from pathlib import Path

from tekfac_edu.arguments import one_of
from tekfac_edu.experiments.configuration import OPTIMIZERS
from tekfac_edu.experiments.processes import processes
from tekfac_edu.experiments.side_by_side import check_at_once, one_run, side_by_side
from tekfac_edu.experiments.training import train


def tuned_in(folder):
    """{optimizer: settings}: what `tune` has left in the folder of a race, if anything."""
    path = Path(folder) / "tuned.json"
    return json.loads(path.read_text()) if path.exists() else {}


def settings_of(preset, folder):
    """{optimizer: settings}: what was tuned in this folder, elsewhere where the preset starts."""
    return preset.starts | tuned_in(folder)


def race(preset, folder, optimizers=OPTIMIZERS, seeds=(0, 1, 2), at_once=1, progress=print, **how):
    """Run what is not finished yet, seed by seed, so that an early end leaves a fair race.

    Parameters
    ----------
    preset : Preset.   folder : of the race; runs go into its folder `runs`.
    optimizers, seeds : which.   at_once : runs side by side, each in a process of its own.
    progress : called with a line per run if there are several at once; else a run has its bar.
    how : passed on to `train` (data_folder, device, bar, tensorboard).

    Returns
    -------
    list of records
    """
    at_once = check_at_once(at_once)
    settings = settings_of(preset, folder)
    records = []
    with processes(how.get("device")):  # once for all runs: torchrun's cannot meet twice
        for seed in seeds:
            for optimizer in optimizers:
                one_of("optimizer", optimizer, OPTIMIZERS)
                configuration = preset.base.replace(
                    **settings[optimizer], optimizer=optimizer, seed=seed
                )
                run = configuration, Path(folder) / "runs" / configuration.name
                records.append(train(*run, **how) if at_once == 1 else _told(*run, how, progress))
        return records if at_once == 1 else side_by_side(records, at_once)


def _told(configuration, folder, how, progress):
    record = yield from one_run(configuration, folder, how)
    run = f"{configuration.optimizer}, seed {configuration.seed}"
    if record["status"] == "finished":
        last = record["epochs"][-1]
        progress(
            f"{run}: training loss {last['train_loss']:.4g}, "
            f"test {record['score']} {last['test_score']:.4g}"
        )
    else:
        progress(f"{run}: {record['status']}")
    return record
