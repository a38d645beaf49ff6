"""Everything that needs a GPU, in one command, into one record.

    python -m benchmarks.gpu_checklist                              (hours: the races)
    python -m benchmarks.gpu_checklist --parts tests steps profile  (minutes)

1. tests     the tests marked gpu: CUDA agrees with the NumPy reference
2. steps     time and memory of a step of every optimizer, ResNet20 and VGG16, batch 128
3. races     CIFAR-10, ResNet20 and then VGG16, every optimizer, several seeds
4. profile   where the time of a TEKFAC step goes

The record is records/gpu_checklist.json, written after every part: device, versions, commit,
command and results. The races are in records/cifar10_resnet20.json and cifar10_vgg16.json, one file
each, for the final chapter; a race that was stopped continues with the same command.
"""

import json
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import torch
import tyro

from benchmarks import RECORDS
from benchmarks.step_profile import profile_step
from tekfac_edu.experiments.configuration import Configuration
from tekfac_edu.experiments.methods import OPTIMIZERS
from tekfac_edu.experiments.migration import migrated_profile, migrated_settings
from tekfac_edu.experiments.networks import NETWORKS
from tekfac_edu.experiments.presets import PRESETS
from tekfac_edu.experiments.racing import race
from tekfac_edu.experiments.records import header, read_races, write_json, write_race
from tekfac_edu.experiments.step_cost import blank_images, measure_steps, steps_table
from tekfac_edu.experiments.tuning import tune

ROOT = Path(__file__).parents[1]
PARTS = ("tests", "steps", "races", "profile")
Model = Literal["resnet20", "vgg16"]


def main(
    parts: tuple[Literal[PARTS], ...] = PARTS,
    device: Literal["cuda", "cpu"] = "cuda",
    models: tuple[Model, ...] = ("resnet20", "vgg16"),
    width: int | None = None,
    batch_size: int = 128,
    intervals: tuple[int, ...] = (10, 50),
    optimizers: tuple[Literal[OPTIMIZERS], ...] = OPTIMIZERS,
    seeds: tuple[int, ...] = (0, 1, 2),
    trials: int = 12,
    epochs: int | None = None,
    tuning_epochs: int | None = None,
    race_interval: int | None = None,
    race_warmup: int | None = None,
    at_once: int = 1,
    data_folder: Path | None = None,
    runs: Path = Path("runs"),
    records: Path = RECORDS,
):
    """Run parts of the checklist.

    Args:
        parts: which, in this order.
        device: cpu is for trying the script out.
        models: of parts 2 to 4.
        width: channels of the first stage; default: the networks as published.
        batch_size: of parts 2 to 4.
        intervals: steps between refreshes, of parts 2 and 4.
        optimizers: of parts 2 and 3.
        seeds: of the races.
        trials: of the tuning before each race, per optimizer; 0: the preset's settings.
        epochs: of the races; default: the preset's.
        tuning_epochs: of a trial; default: the preset's, at most those of the races.
        race_interval: steps between refreshes in races and their tuning; default: the preset's.
        race_warmup: steps at a run's beginning that refresh everything; default: the preset's.
        at_once: runs at a time on one device; pays on a GPU that one run does not fill.
        data_folder: Parquet files of CIFAR-10; default: download once.
        runs: where races keep their checkpoints.
        records: where the records go.
    """
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; --device cpu tries the script out")
    records.mkdir(parents=True, exist_ok=True)
    path = records / "gpu_checklist.json"
    record = before(path) | header(device)

    def network(model, interval):
        return Configuration(model=model, width=width, batch_size=batch_size, interval=interval)

    say = partial(print, flush=True)
    for part in parts:
        start = time.perf_counter()
        if part == "tests":
            record["tests"] = run_gpu_tests()
            print(f"tests marked gpu: {record['tests']}")
        elif part == "steps":
            record["steps"] = [
                measure_steps(
                    network(model, interval),
                    blank_images(NETWORKS[model].image),
                    device,
                    optimizers,
                )
                for model in models
                for interval in intervals
            ]
            for measured in record["steps"]:
                c = measured["configuration"]
                print(f"\n{c['model']}, interval {c['interval']}\n{steps_table(measured)}")
        elif part == "races":
            record["races"] = {}
            for model in models:
                preset = PRESETS[f"cifar10-{model}"]
                given = {"epochs": epochs, "interval": race_interval, "warmup": race_warmup}
                given = {name: value for name, value in given.items() if value is not None}
                base = preset.base.replace(width=width, batch_size=batch_size, **given)
                shorter = min(preset.tuning_epochs, base.epochs)
                preset = replace(preset, base=base, tuning_epochs=tuning_epochs or shorter)
                folder = runs / f"cifar10-{model}"
                options = {"data_folder": data_folder and str(data_folder), "device": device}
                if trials:
                    tune(preset, folder, optimizers, trials, say, at_once, **options)
                race(preset, folder, optimizers, seeds, at_once, say, **options)
                saved = records / f"cifar10_{model}.json"
                write_race(saved, *read_races([folder]))
                record["races"][model] = saved.name
        elif part == "profile":
            record["profile"] = [
                {
                    "model": model,
                    "interval": interval,
                    "seconds_per_step": profile_step(network(model, interval), device),
                }
                for model in models
                for interval in intervals
            ]
        record.setdefault("seconds", {})[part] = round(time.perf_counter() - start, 1)
        write_json(path, record)
        print(f"{part}: {record['seconds'][part]} s; {path}", flush=True)


def before(path):
    """What an earlier call has left, of any format, in today's words."""
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for measured in record.get("steps", ()):
        measured["configuration"] = migrated_settings(measured["configuration"])
    for profiled in record.get("profile", ()):
        profiled["seconds_per_step"] = migrated_profile(profiled["seconds_per_step"])
    return record


def run_gpu_tests():
    """Counts of the tests marked gpu, and the names of those that failed."""
    report = ROOT / ".pytest_cache" / "gpu.xml"
    files = [
        str(file.relative_to(ROOT))
        for file in sorted((ROOT / "tests").rglob("test_*.py"))
        if "pytest.mark.gpu" in file.read_text(encoding="utf-8")
    ]  # the others may need packages of the book
    arguments = ["-q", "-m", "gpu", f"--junitxml={report}", *files]
    done = subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT)
    suite = ElementTree.parse(report).getroot().find("testsuite")
    names = ("tests", "failures", "errors", "skipped")
    counts = {name: int(suite.get(name)) for name in names}
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return (
        counts
        | {"passed": counts["tests"] - sum(counts[n] for n in names[1:])}
        | {
            "failed": failed,
            "exit_status": done.returncode,
        }
    )


if __name__ == "__main__":
    tyro.cli(main)
