"""If this fails, a race repeats finished runs, loses what was begun, or stops at divergence."""

import json
import os
import signal

import pytest
import torch

from tekfac_edu.experiments import command_line, presets
from tekfac_edu.experiments.methods import OPTIMIZERS
from tekfac_edu.experiments.presets import PRESETS
from tekfac_edu.experiments.racing import race
from tekfac_edu.experiments.records import read_races
from tekfac_edu.experiments.reporting import targets_table

from . import STEPS, Nth, in_process, numbers, tiny_preset, write_output_to

HOW = {"device": "cpu", "bar": False}


def written(path):
    """Another file, or another time, if it was written again."""
    return path.stat().st_ino, path.stat().st_mtime_ns


def names(folder):
    return sorted(path.parent.name for path in folder.glob("runs/*/record.json"))


def test_every_optimizer_has_every_seed_seed_by_seed(tmp_path):
    records = race(tiny_preset(), tmp_path, seeds=(3, 1), **HOW)
    ran = [(r["configuration"]["seed"], r["configuration"]["optimizer"]) for r in records]
    assert ran == [(seed, name) for seed in (3, 1) for name in OPTIMIZERS]
    assert len(names(tmp_path)) == 12
    starts = tiny_preset().starts
    for record in records:
        settings = starts[record["configuration"]["optimizer"]]
        assert {name: record["configuration"][name] for name in settings} == settings
        assert not record["configuration"]["held_out"]
    assert len({record["epochs"][-1]["train_loss"] for record in records}) == 12


def test_a_race_goes_on_after_a_run_that_diverged(tmp_path):
    starts = tiny_preset().starts
    starts["sgd"]["lr"] = 1e38
    records = race(tiny_preset(starts=starts), tmp_path, ["sgd", "tekfac"], [0, 1], **HOW)
    assert [record["status"] for record in records] == 2 * ["diverged", "finished"]
    again = race(tiny_preset(starts=starts), tmp_path, ["sgd", "tekfac"], [0, 1], **HOW)
    assert again == json.loads(json.dumps(records))


def test_an_unknown_optimizer_is_named(tmp_path):
    with pytest.raises((ValueError, KeyError), match="rmsprop"):
        race(tiny_preset(), tmp_path, ["rmsprop"], **HOW)


def compare(folder, killed_at):
    """In another process: the command, with a tiny preset, killed at a step of the third run."""
    torch.set_num_threads(1)
    write_output_to(folder.parent / "output")
    presets.PRESETS["digits-mlp"] = tiny_preset()
    if killed_at:
        kill = "tekfac_edu.experiments.training:Run._step", killed_at
        Nth(*kill, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    options = "--optimizers sgd tekfac --seeds 0 1 --device cpu --folder".split()
    command_line.sys.argv = ["tekfac-edu", "compare", "digits-mlp", *options, str(folder)]
    command_line.main()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_compare_killed_in_the_middle_is_resumed(tmp_path):
    """Finished runs are not touched; tables are those of a race never killed."""
    folder = tmp_path / "race"
    assert in_process(compare, folder, 5 * STEPS + 2) == -signal.SIGKILL
    finished = {path: written(path) for path in folder.glob("runs/*/record.json")}
    assert len(finished) == 2
    assert len(list(folder.glob("runs/*/checkpoint-*.pt"))) == 1
    assert in_process(compare, folder, None) == 0
    assert {path: written(path) for path in finished} == finished
    output = (tmp_path / "output").read_text()
    assert f"tekfac-edu report {folder} --targets " in output
    runs, trials = read_races([folder])
    assert len(runs) == 4 and not trials
    assert sorted(run["continued"] for run in runs) == [0, 0, 0, 1]
    race(tiny_preset(), tmp_path / "whole", ["sgd", "tekfac"], [0, 1], **HOW)
    whole, _ = read_races([tmp_path / "whole"])
    assert list(map(numbers, runs)) == list(map(numbers, whole))
    table = targets_table(runs, (2.0, 1.5))
    assert table == targets_table(whole, (2.0, 1.5)) and "TEKFAC" in table


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_races_of_all_optimizers(name):
    preset = PRESETS[name]
    assert set(preset.starts) == set(OPTIMIZERS)
    for optimizer, settings in preset.starts.items():
        configuration = preset.base.replace(**settings, optimizer=optimizer)
        assert configuration.replace(epochs=preset.tuning_epochs, held_out=True).held_out
        assert (settings["weight_decay"] > 0) == preset.weight_decay
        assert ("damping" in settings) == (optimizer not in ("sgd", "adam"))
    assert list(preset.targets) == sorted(preset.targets, reverse=True)
