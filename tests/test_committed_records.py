"""If this fails, a number in the book comes from a record that does not say how it was made."""

import json
import math
import re
from pathlib import Path

import pytest

from tekfac_edu.experiments.configuration import Configuration
from tekfac_edu.experiments.records import FORMAT, read_races

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


def settings_in(content):
    """All the configurations in a record, whole or not, however deep."""
    if isinstance(content, dict):
        if "dataset" in content and "interval" in content:
            yield content
        else:
            for part in content.values():
                yield from settings_in(part)
    elif isinstance(content, list):
        for part in content:
            yield from settings_in(part)


SETTINGS = {path.stem: list(settings_in(read(path))) for path in RECORDS}
FORMAT_1 = {  # setting: where it is now
    "warmup_steps": lambda c: c.warmup,
    "factor_decay": lambda c: c.decay,
    "scale_decay": lambda c: c.decay,
    "damping_policy": lambda c: "trace" if c.damping_rule == "by-trace" else "constant",
    "eigenbasis": lambda c: c.cost.eigenbasis,
    "input_rank": lambda c: c.cost.input_rank,
    "factor_rows": lambda c: c.cost.factor_rows,
    "scale_examples": lambda c: c.cost.eigenvalue_examples,
    "stagger": lambda c: c.cost.stagger,
    "precision": lambda c: c.cost.precision,
    "widths": lambda c: None if c.widths is None else list(c.widths),
    "cost": lambda c: vars(c.cost),
}


@pytest.mark.parametrize("name", [name for name, found in SETTINGS.items() if found])
def test_every_configuration_of_every_record_can_be_read(name):
    """Whatever its format: each setting it names is in today's configuration."""
    for settings in SETTINGS[name]:
        configuration = Configuration.from_dict(settings)
        for setting, value in settings.items():
            now = FORMAT_1.get(setting, lambda c, setting=setting: getattr(c, setting))
            assert now(configuration) == value, setting


def test_there_are_configurations_to_be_read():
    assert sum(map(len, SETTINGS.values())) > 280
    old = [s for found in SETTINGS.values() for s in found if "warmup_steps" in s]
    assert all(name in s for s in old for name in ("factor_decay", "scale_decay", "eigenbasis"))


RACES = [path for path in RECORDS if "trials" in read(path)]


@pytest.mark.parametrize("path", RACES, ids=lambda path: path.stem)
def test_a_race_is_whole(path):
    """Every optimizer with every seed, every epoch; equal numbers of trials."""
    runs, trials = read_races([path])
    assert {run["format"] for run in runs + trials} == {FORMAT}
    raced = {(r["configuration"]["optimizer"], r["configuration"]["seed"]) for r in runs}
    optimizers, seeds = ({key[i] for key in raced} for i in (0, 1))
    assert len(runs) == len(raced) == len(optimizers) * len(seeds)
    assert len(optimizers) == 6 and len(seeds) >= 3
    for run in [*runs, *trials]:
        assert run["commit"] and not run["commit"].endswith("+")
        if run["status"] == "finished":
            assert len(run["epochs"]) == run["configuration"]["epochs"]
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
