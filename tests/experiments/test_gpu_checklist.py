"""If this fails, whoever has a GPU for an hour loses it to a script that was never run."""

import io
import json
import multiprocessing
import sys

import numpy as np
import pytest
import torch
import tyro

from benchmarks import RECORDS, gpu_checklist
from tekfac_edu.experiments import at_once
from tekfac_edu.experiments.configuration import Configuration
from tekfac_edu.experiments.records import read_races

from . import PRELOAD

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A CIFAR-10 of 64 + 16 images of noise, as Parquet files."""
    import datasets
    from PIL import Image

    folder, draw = tmp_path_factory.mktemp("cifar10"), np.random.default_rng(0)

    def png():
        file = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "png")
        return {"bytes": file.getvalue(), "path": None}

    features = {"img": datasets.Image(), "label": datasets.ClassLabel(names=list("abcdefghij"))}
    for part, count in (("train", 64), ("test", 16)):
        rows = {"img": [png() for _ in range(count)], "label": [i % 10 for i in range(count)]}
        part_set = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        part_set.to_parquet(folder / f"{part}-00000-of-00001.parquet")
    return folder


def diverged(run):
    return run["status"] != "finished"


def test_steps_and_profile_and_races_leave_their_records(tmp_path, pictures, monkeypatch):
    context = multiprocessing.get_context("forkserver")  # spawned workers: test_at_once.py
    context.set_forkserver_preload(PRELOAD)
    monkeypatch.setattr(at_once, "CONTEXT", context)

    def run(*arguments):
        small = "--device cpu --models resnet20 --width 2 --batch-size 8 --intervals 2".split()
        places = ["--records", str(tmp_path / "records"), "--runs", str(tmp_path / "runs")]
        monkeypatch.setattr(sys, "argv", [gpu_checklist.__file__, *small, *places, *arguments])
        tyro.cli(gpu_checklist.main)

    run("--parts", "steps", "profile", "--optimizers", "sgd", "tekfac")
    path = tmp_path / "records" / "gpu_checklist.json"
    record = json.loads(path.read_text())
    assert record["command"].startswith("python -m benchmarks.gpu_checklist --device cpu")
    assert list(record["steps"][0]["steps"]) == ["sgd", "tekfac"]
    assert record["steps"][0]["configuration"]["width"] == 2
    (profile,) = record["profile"]
    assert (profile["model"], profile["interval"]) == ("resnet20", 2)
    assert sum(profile["seconds_per_step"].values()) > 0
    assert set(record["seconds"]) == {"steps", "profile"}

    shorter = ["--epochs", "2", "--seeds", "0", "1", "--trials", "1", "--tuning-epochs", "1"]
    shorter += ["--race-interval", "3", "--race-warmup", "0", "--at-once", "2"]
    data = ["--data-folder", str(pictures), "--optimizers", "sgd", "tekfac"]
    run("--parts", "races", *shorter, *data)
    record = json.loads(path.read_text())
    assert set(record["seconds"]) == {"steps", "profile", "races"} and record["steps"]
    runs, trials = read_races([tmp_path / "records" / record["races"]["resnet20"]])
    assert len(runs) == 4 and len(trials) == 2
    given = {"interval": 3, "warmup": 0}
    for run in runs + trials:
        assert {name: run["configuration"][name] for name in given} == given
    assert {len(run["epochs"]) for run in runs} == {2}
    assert {len(trial["epochs"]) for trial in trials} == {1}
    assert {run["train_images"] for run in runs} == {64} and not any(map(diverged, runs))


def test_an_old_record_that_is_continued_has_one_format(tmp_path):
    """Its step times and profiles as they were, in today's words."""
    path = tmp_path / "gpu_checklist.json"
    old = json.loads((RECORDS / path.name).read_text())
    assert old["format"] == 1 and "eigh" in old["profile"][0]["seconds_per_step"]
    path.write_text(json.dumps(old))
    gpu_checklist.main(parts=("steps",), device="cpu", records=tmp_path, models=(), intervals=(2,))
    new = json.loads(path.read_text())
    assert new["format"] == 2 and new["steps"] == [] and new["tests"] == old["tests"]
    for one, other in zip(new["profile"], old["profile"], strict=True):
        seconds, before = one["seconds_per_step"], other["seconds_per_step"]
        assert sum(seconds.values()) == pytest.approx(sum(before.values()))
        assert seconds["eigenbases"] == pytest.approx(before["eigh"] + before["move"])
    for measured in gpu_checklist.before(RECORDS / path.name)["steps"]:
        assert measured["configuration"].keys() <= Configuration().as_dict().keys()


def test_a_machine_without_a_gpu_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU here"):
        gpu_checklist.main(records=tmp_path)
