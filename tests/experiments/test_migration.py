"""If this fails, an old record is read as another run than it was, or one that nobody can run."""

import json

import pytest
import torch

from tekfac_edu.experiments import checkpoints, training
from tekfac_edu.experiments.configuration import Configuration, Cost
from tekfac_edu.experiments.migration import migrated_profile, migrated_record, migrated_settings
from tekfac_edu.experiments.records import read_races, read_record

from . import last_state, numbers, run, tiny

OLD = {  # as format 1 had it, every setting of a Kronecker optimizer unlike its default
    "model": "mlp",
    "dataset": "digits",
    "optimizer": "ekfac",
    "lr": 0.3,
    "damping": 0.5,
    "widths": [9, 4],
    "interval": 5,
    "warmup_steps": 6,
    "factor_decay": 0.5,
    "scale_decay": 0.5,
    "damping_rule": "paper",
    "damping_policy": "trace",
    "fisher": "exact",
    "eigenbasis": "qr",
    "input_rank": 5,
    "factor_rows": 2.5,
    "scale_examples": 7,
    "stagger": True,
    "precision": "bfloat16",
    "seed": 8,
}
NEW = Configuration(
    "mlp",
    "digits",
    "ekfac",
    lr=0.3,
    damping=0.5,
    widths=(9, 4),
    interval=5,
    warmup=6,
    decay=0.5,
    damping_rule="by-trace",
    fisher="exact",
    cost=Cost(2.5, 7, 5, "qr", True, "bfloat16"),
    seed=8,
)


def test_every_old_setting_has_its_new_name():
    before = json.dumps(OLD)
    assert Configuration.from_dict(OLD) == NEW
    assert json.dumps(OLD) == before
    constant = OLD | {"damping_policy": "constant"}
    assert Configuration.from_dict(constant) == NEW.replace(damping_rule="paper")
    added = constant | {"damping_rule": "added"}
    assert Configuration.from_dict(added) == NEW.replace(damping_rule="added")


@pytest.mark.parametrize("name", ["warmup_steps", "eigenbasis", "stagger", "factor_decay"])
def test_what_an_old_record_does_not_say_is_the_default(name):
    """It was written before there was such a setting, when everything was as by default."""
    settings = {n: v for n, v in OLD.items() if n != name}
    if name == "factor_decay":
        settings["scale_decay"] = 0.95
    default = Configuration()
    expected = {
        "warmup_steps": {"warmup": default.warmup},
        "eigenbasis": {"cost": Cost(2.5, 7, 5, "eigh", True, "bfloat16")},
        "stagger": {"cost": Cost(2.5, 7, 5, "qr", False, "bfloat16")},
        "factor_decay": {"decay": default.decay},
    }[name]
    assert Configuration.from_dict(settings) == NEW.replace(**expected)


def test_settings_of_today_stay_as_they_are():
    for settings in (NEW.as_dict(), {}, {"lr": 0.1}, {"cost": {"stagger": True}}):
        assert migrated_settings(settings) == settings
    with pytest.raises(ValueError, match="unknown settings in the configuration: eigenbasis"):
        Configuration.from_dict(NEW.as_dict() | {"eigenbasis": "qr"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_decay": 0.25}, "factor_decay 0.5 and scale_decay 0.25: there is one decay"),
        ({"factor_decay": None}, "factor_decay 0.95 and scale_decay 0.5: there is one decay"),
        ({"damping_rule": "added"}, 'damping_policy "trace" and damping_rule "added"'),
    ],
)
def test_what_cannot_be_said_any_more_is_refused_by_name(changes, message, tmp_path):
    settings = {n: v for n, v in (OLD | changes).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        Configuration.from_dict(settings)
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"format": 1, "configuration": settings}))
    with pytest.raises(ValueError, match=f"{path} is not the record of a run: .*{message}"):
        read_record(path)


def old(record):
    """A record of TINY as format 1 had it."""
    record = json.loads(json.dumps(record))
    c = record["configuration"]
    cost = c.pop("cost")
    cost["scale_examples"] = cost.pop("eigenvalue_examples")
    decay = c.pop("decay")
    c |= cost | {"warmup_steps": c.pop("warmup"), "factor_decay": decay, "scale_decay": decay}
    c["damping_policy"] = "constant"
    record["finished"] = record.pop("date")
    return record | {"format": 1}


def test_an_old_run_that_is_finished_is_only_read(tmp_path, monkeypatch):
    record = run(tiny(), tmp_path / "run")
    path = tmp_path / "run" / "record.json"
    path.write_text(json.dumps(old(record)))
    monkeypatch.setattr(training, "Run", None)
    again = run(tiny(), tmp_path / "run")
    assert again == json.loads(json.dumps(record)) and numbers(again) == numbers(record)
    assert read_races([tmp_path / "run"]) == ([again], [])
    race = tmp_path / "race.json"
    race.write_text(json.dumps({"format": 1, "runs": [old(record)], "trials": []}))
    assert read_races([race]) == ([again], [])
    assert migrated_record(again) == again
    with pytest.raises(ValueError, match=r"holds another run .*decay: 0.95 there, 0.5 here"):
        run(tiny(decay=0.5), tmp_path / "run")


def test_an_old_run_that_was_stopped_is_refused(tmp_path, monkeypatch):
    """Its optimizer's state has other names, too."""
    monkeypatch.setattr(training, "remove_checkpoints", lambda folder: None)
    run(tiny(), tmp_path)
    (tmp_path / "record.json").unlink()
    state = last_state(tmp_path)
    del state["format"]
    settings = old({"configuration": state["configuration"], "date": ""})["configuration"]
    torch.save(state | {"configuration": settings}, checkpoints.checkpoints(tmp_path)[-1])
    with pytest.raises(ValueError, match=f"the checkpoints in {tmp_path} are of an older version"):
        run(tiny(), tmp_path)
    with pytest.raises(ValueError, match=r"holds another run .*seed: 0 there, 1 here"):
        run(tiny(seed=1), tmp_path)


def test_a_profile_has_the_phases_that_are_told_apart_now():
    seconds = {"forward": 1, "patches": 2, "factors": 4, "eigh": 8, "move": 16, "measure": 32}
    seconds |= {"update": 64, "other": 128}
    new = migrated_profile(seconds)
    expected = {"forward": 1, "factors": 6, "eigenbases": 24, "eigenvalues": 32}
    assert new == expected | {"update": 64, "other": 128}
    assert migrated_profile(new) == new
