"""If this fails, records cannot be read back, or do not say how their numbers came about."""

import json
import os
import platform
import sys

import pytest
import torch

import tekfac_edu
from tekfac_edu.experiments import records
from tekfac_edu.experiments.configuration import Configuration
from tekfac_edu.experiments.records import (
    header,
    read_races,
    read_record,
    write_json,
    write_race,
)

from . import run, tiny


def strict(path):
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(token):
        raise AssertionError(token)

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs and a trial."""
    folder = tmp_path_factory.mktemp("race")
    for seed in (0, 1):
        run(tiny("sgd", seed=seed), folder / "runs" / str(seed))
    run(tiny("sgd", held_out=True), folder / "trials" / "0")
    return folder


def test_a_record_has_everything(folder):
    record = strict(folder / "runs" / "1" / "record.json")
    assert record.pop("format") == 2
    assert Configuration.from_dict(record.pop("configuration")) == tiny("sgd", seed=1)
    assert record.pop("status") == "finished"
    assert "thread" in record.pop("device")
    assert record.pop("versions") == {
        "tekfac_edu": tekfac_edu.__version__,
        "torch": torch.__version__,
        "cuda": None,
        "python": platform.python_version(),
    }
    commit = record.pop("commit")
    assert commit is None or len(commit.rstrip("+")) >= 7
    assert record.pop("command") and record.pop("processes") == 1
    assert len(record.pop("date")) == len("2026-01-01")
    assert record.pop("parameters") == 64 * 8 + 8 + 8 * 10 + 10
    assert (record.pop("train_images"), record.pop("test_images")) == (1437, 360)
    assert record.pop("score") == "accuracy" and record.pop("continued") == 0
    epochs = record.pop("epochs")
    assert not record
    names = {"train_loss", "test_loss", "test_score", "lr", "seconds", "cpu_seconds"}
    assert len(epochs) == 2 and all(set(epoch) == names for epoch in epochs)
    assert all(isinstance(value, float) for epoch in epochs for value in epoch.values())
    assert 0 < epochs[0]["seconds"] < epochs[1]["seconds"]
    assert [epoch["lr"] for epoch in epochs] == pytest.approx([0.15, 0.0], abs=1e-12)


def test_the_record_in_the_folder_is_the_one_returned(folder):
    again = run(tiny("sgd"), folder / "runs" / "0")
    assert again == strict(folder / "runs" / "0" / "record.json")
    assert again == read_record(folder / "runs" / "0" / "record.json")


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("/usr/bin/tekfac-edu", "tekfac-edu train --lr '0.1 2'"),
        ("/site-packages/tekfac_edu/experiments/command_line.py", "tekfac-edu train --lr '0.1 2'"),
        ("my study.py", "'my study.py' train --lr '0.1 2'"),
    ],
)
def test_the_command_is_that_of_the_user(program, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, "train", "--lr", "0.1 2"])
    assert header("cpu")["command"] == expected


def test_one_file_holds_a_race(folder, tmp_path):
    runs, trials = read_races([folder])
    assert [r["configuration"]["seed"] for r in runs] == [0, 1]
    assert [r["configuration"]["held_out"] for r in trials] == [True]
    file = tmp_path / "race.json"
    write_race(file, runs, trials)
    strict(file)
    assert read_races([file]) == (runs, trials)
    one = folder / "runs" / "1" / "record.json"
    assert read_races([one, file]) == ([runs[1], *runs], trials)


def test_a_record_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_json(path, {"old": "é"})
    assert path.read_text(encoding="utf-8") == '{"old": "é"}\n'

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"record\.json could not be written .*No space.*same command"
    ):
        write_json(path, {"new": 1})
    assert strict(path) == {"old": "é"}
    assert list(tmp_path.iterdir()) == [path]


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    flushed = []

    def fsync(number):
        names = [path.name for path in tmp_path.iterdir()]
        flushed.append((names, os.fstat(number).st_ino, os.fstat(number).st_size))

    monkeypatch.setattr(os, "fsync", fsync)
    path = tmp_path / "record.json"
    write_json(path, [1])
    assert flushed[0] == (["record.json.unfinished"], path.stat().st_ino, path.stat().st_size)
    if os.name == "posix":
        assert [(names, number) for names, number, _ in flushed[1:]] == [
            ([path.name], tmp_path.stat().st_ino)
        ]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_cannot_hold_is_an_error_not_a_token(value, tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "record.json", {"loss": value})
    assert not (tmp_path / "record.json").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[1, 2]",
        lambda text: "{}",
        lambda text: text.replace('"format": 2', '"format": 3'),
        lambda text: text.replace('"lr"', '"rate"', 1),
        lambda text: text.replace('"sgd"', '"sdg"', 1),
    ],
)
def test_what_is_no_record_is_named(folder, tmp_path, change):
    path = tmp_path / "record.json"
    path.write_text(change((folder / "runs" / "0" / "record.json").read_text()))
    with pytest.raises(ValueError, match=f"{path} is not the record of a run"):
        read_record(path)


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*nowhere"):
        read_races([tmp_path / "nowhere"])


def test_numbers_have_six_digits_and_none_for_what_is_not_finite():
    from tekfac_edu.experiments.training import _rounded

    assert _rounded(0.12345678) == 0.123457
    assert _rounded(float("nan")) is None and _rounded(float("-inf")) is None


def test_outside_git_there_is_no_commit(monkeypatch, tmp_path):
    records._commit.cache_clear()
    monkeypatch.setattr(tekfac_edu, "__file__", str(tmp_path / "__init__.py"))
    try:
        assert records._commit() is None
    finally:
        records._commit.cache_clear()
