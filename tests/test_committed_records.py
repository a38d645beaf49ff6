"""If this fails, a number in the book comes from a record that does not say how it was made."""

import json
import math
import re
from pathlib import Path

import pytest

from tekfac_edu.experiments.configuration import Configuration

ROOT = Path(__file__).parents[1]
RECORDS = sorted((ROOT / "benchmarks" / "records").glob("*.json"))
MAX_BYTES = 1_000_000


def read(path):
    def refuse(token):
        raise AssertionError(f"{path.name} holds {token}, which is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def made(record):
    """The parts of a file that were each made at one time: the file itself, or its runs."""
    return record["runs"] + record["trials"] if "trials" in record else [record]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_names_device_versions_command_and_date(path):
    for part in made(read(path)):
        assert part["device"]
        assert re.match(r"\d+\.\d+", part["versions"]["torch"])
        assert part["command"].split()[0] in ("python", "tekfac-edu")
        date = part.get("date") or part.get("finished")
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", date)
        assert not re.search(r"/(?:home|tmp|root|work)/", part["command"])


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_is_small(path):
    assert path.stat().st_size < MAX_BYTES


RACES = [path for path in RECORDS if "trials" in read(path)]


@pytest.mark.parametrize("path", RACES, ids=lambda path: path.stem)
def test_a_race_is_whole(path):
    """Every optimizer with every seed, every epoch; equal numbers of trials."""
    record = read(path)
    runs, trials = record["runs"], record["trials"]
    raced = {(r["configuration"]["optimizer"], r["configuration"]["seed"]) for r in runs}
    optimizers, seeds = ({key[i] for key in raced} for i in (0, 1))
    assert len(runs) == len(raced) == len(optimizers) * len(seeds)
    assert len(optimizers) == 6 and len(seeds) >= 3
    for run in [*runs, *trials]:
        configuration = Configuration.from_dict(run["configuration"])
        assert run["commit"] and not run["commit"].endswith("+")
        if run["status"] == "finished":
            assert len(run["epochs"]) == configuration.epochs
        seconds = [epoch["seconds"] for epoch in run["epochs"]]
        assert seconds == sorted(seconds) and all(map(math.isfinite, seconds))
    had = [trial["configuration"]["optimizer"] for trial in trials]
    assert len({had.count(name) for name in optimizers}) == 1
    assert all(t["configuration"]["held_out"] for t in trials)
    assert not seeds & {t["configuration"]["seed"] for t in trials}


@pytest.mark.parametrize("path", RACES, ids=lambda path: path.stem)
def test_a_race_ran_with_the_settings_its_trials_found_best(path):
    record = read(path)
    for name in {run["configuration"]["optimizer"] for run in record["runs"]}:
        finished = [
            trial
            for trial in record["trials"]
            if trial["configuration"]["optimizer"] == name and trial["status"] == "finished"
        ]
        best = min(finished, key=lambda trial: trial["epochs"][-1]["test_loss"])["configuration"]
        for run in record["runs"]:
            c = run["configuration"]
            if c["optimizer"] == name:
                settings = ("lr", "damping", "weight_decay")
                assert [c[s] for s in settings] == [best[s] for s in settings]
