"""If this fails, the same command under torchrun trains something else, or its processes collide.

Losses may differ from one process by 1e-4 of their size: float32 sums in another order, rounded to
6e-8, which the inverse of a curvature and some steps enlarge.
"""

import os
import signal
import subprocess
import sys
import time

import pytest
from torch import distributed

from tekfac_edu.experiments import checkpoints
from tekfac_edu.experiments.records import read_record

from . import numbers, run, tiny

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="no gloo"
)

COMMAND = """
train --model mlp --dataset digits --widths 8 --epochs 4 --batch-size 256 --interval 2
--optimizer tekfac --lr 0.3 --damping 0.01 --device cpu --no-tensorboard --folder
""".split()
RACE = "compare tiny --optimizers sgd tekfac --seeds 0 --device cpu --folder".split()
SCRIPT = """
import json, os, pathlib, time
import torch
from tekfac_edu.experiments import presets, training
from tekfac_edu.experiments.configuration import Configuration

torch.set_num_threads(1)
training.CHECKPOINT_SECONDS = 0
if os.environ["RANK"] != "0":
    def forbidden(*_, **__):
        raise AssertionError("only the first process writes")

    torch.save = json.dump = pathlib.Path.mkdir = pathlib.Path.replace = forbidden

step = training.Run._step

def slow(self, x, y):
    time.sleep(0.3 * (self.configuration.optimizer == "tekfac"))
    return step(self, x, y)

training.Run._step = slow
base = Configuration("mlp", "digits", widths=(8,), epochs=4, batch_size=256, interval=2)
starts = {
    "sgd": {"lr": 0.3, "weight_decay": 0.0},
    "tekfac": {"lr": 0.3, "damping": 0.01, "weight_decay": 0.0},
}
presets.PRESETS["tiny"] = presets.Preset("tiny", base, starts, (1.0,), 1)

from tekfac_edu.experiments.command_line import main

main()
"""


def launch(program, *arguments):
    """Start two processes; program: -m and a module, or a script."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        [*command, "--standalone", *program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment if sys.platform == "linux" else os.environ | {"OMP_NUM_THREADS": "1"},
    )


def assert_close(record, expected):
    one, other = numbers(record), numbers(expected)
    for ours, theirs in zip(one.pop("epochs"), other.pop("epochs"), strict=True):
        for name in ("train_loss", "test_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
        assert ours["test_score"] == pytest.approx(theirs["test_score"], abs=2.5 / 360)
        assert ours["lr"] == theirs["lr"]
    assert one == other


def test_a_race_stopped_and_its_last_run_continued_equal_one_process(tmp_path):
    """Two runs in the same processes, SIGTERM to torchrun within an epoch of the second.

    Then the plain command for the run that was stopped, as a user gives it.
    """
    script = tmp_path / "race.py"
    script.write_text(SCRIPT)
    process = launch([script], *RACE, tmp_path / "race")
    folder = tmp_path / "race" / "runs" / "tekfac-lr0.3-damping0.01-seed0"
    deadline = time.monotonic() + 60
    while not checkpoints.checkpoints(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert f"saved in {folder}; the same command continues" in output, output
    assert "only the first process writes" not in output
    assert not (folder / "record.json").exists()
    stopped_at = int(checkpoints.checkpoints(folder)[-1].stem.rpartition("-")[2])
    assert 0 < stopped_at < 20

    process = launch(["-m", "tekfac_edu.experiments.command_line"], *COMMAND, folder)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert output.count("finished: training loss") == 1  # one of them prints
    assert "step/s" not in output  # and no bar where nobody looks
    assert not checkpoints.checkpoints(folder)
    continued = read_record(folder / "record.json")
    assert continued["processes"] == 2 and continued["continued"] == 1
    assert continued["command"].startswith("tekfac-edu train --model mlp")
    assert_close(continued, run(tiny(epochs=4, warmup=20), tmp_path / "tekfac"))

    (path,) = tmp_path.glob("race/runs/sgd-*/record.json")
    whole = read_record(path)
    assert whole["processes"] == 2 and whole["continued"] == 0
    assert_close(whole, run(tiny("sgd", epochs=4, warmup=20), tmp_path / "sgd"))
