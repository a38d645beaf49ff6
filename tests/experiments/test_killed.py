"""If this fails, a run that was killed or interrupted loses its work, or ends with other numbers.

Every run here is stopped in a process of its own, by a real signal at a moment that the test picks,
and continued in this one. It must end with the record and with the bits of a run never stopped.
"""

import io
import json
import os
import signal

import pytest
import torch

from tekfac_edu.experiments import checkpoints, command_line, training
from tekfac_edu.experiments.configuration import Cost
from tekfac_edu.experiments.methods import OPTIMIZERS

from . import (
    STEPS,
    Nth,
    in_process,
    last_state,
    numbers,
    run,
    same_bits,
    tiny,
    write_output_to,
)

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")

RUNS = {name: tiny(name) for name in OPTIMIZERS} | {
    "mc": tiny(fisher="mc"),
    "exact, qr": tiny(fisher="exact", cost=Cost(eigenbasis="qr")),
    "decay, by trace": tiny(weight_decay=0.01, damping_rule="by-trace"),
    "bf16": tiny(bf16=True),
    "autoencoder": tiny(model="autoencoder", lr=1e-3, fisher="mc", train_images=512),
    "resnet20, crops": tiny(
        model="resnet20", widths=None, width=2, augment=True, train_images=512, batch_size=128
    ),
}


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def half_a_checkpoint(state, file):
    whole = io.BytesIO()
    save(state, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()
    die()


def half_a_record(content, file, **options):
    text = json.dumps(content)
    file.write(text[: len(text) // 2])
    file.flush()
    die()


save = torch.save
TRAINING = "tekfac_edu.experiments.training"
STEP = f"{TRAINING}:Run._step"

# "module:function", which call of it, what happens instead; a file is two calls of fsync, its
# own and the folder's
MOMENTS = {
    "before the first checkpoint": (STEP, 3, die),
    "in the second epoch": (STEP, STEPS + 3, die),
    "in the first evaluation": (f"{TRAINING}:evaluate", 1, die),
    "in the second evaluation": (f"{TRAINING}:evaluate", 2, die),
    "half of the first checkpoint": ("torch:save", 1, half_a_checkpoint),
    "half of the second checkpoint": ("torch:save", 2, half_a_checkpoint),
    "a checkpoint not renamed": ("os:fsync", 3, die),
    "a checkpoint just renamed": ("tekfac_edu.experiments.files:_sync", 2, die),
    "half of the record": ("json:dump", 1, half_a_record),
    "the record not renamed": ("os:fsync", 5, die),
    "the record written, checkpoints there": (f"{TRAINING}:remove_checkpoints", 1, die),
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """name of RUNS -> record and last state of a run never stopped, made once."""
    made = {}

    def made_once(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("unbroken")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(training, "remove_checkpoints", lambda folder: None)
                made[name] = run(RUNS[name], folder), last_state(folder)
        return made[name]

    return made_once


@pytest.fixture
def continued(unbroken, monkeypatch):
    """Continue what a folder holds; assert that it ends as if never stopped."""

    def check(name, folder):
        monkeypatch.setattr(training, "remove_checkpoints", lambda folder: None)
        record = run(RUNS[name], folder)
        expected, state = unbroken(name)
        assert numbers(record) == numbers(expected)
        assert same_bits(last_state(folder), state)
        assert not list(folder.glob("*.unfinished"))
        written = json.loads((folder / "record.json").read_text())
        assert numbers(written) == numbers(expected)
        return record

    return check


def stop(folder, name, moments, checkpoint_seconds):
    """In another process: run until one of these moments."""
    torch.set_num_threads(1)
    training.CHECKPOINT_SECONDS = checkpoint_seconds
    for moment in moments:
        Nth(*moment)
    run(RUNS[name], folder)


def killed(folder, name, *moments, checkpoint_seconds=60):
    assert in_process(stop, folder, name, moments, checkpoint_seconds) == -signal.SIGKILL


# kill -9


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_at_any_moment_ends_as_if_never_killed(moment, tmp_path, continued):
    folder = tmp_path / "run"
    killed(folder, "tekfac", MOMENTS[moment])
    assert (folder / "record.json").exists() == (moment == "the record written, checkpoints there")
    continued("tekfac", folder)


@pytest.mark.parametrize("name", RUNS)
def test_every_kind_of_run_killed_within_an_epoch_goes_on_from_its_last_step(
    name, tmp_path, continued
):
    """With a checkpoint after every step, the last one half written."""
    killed(tmp_path, name, ("torch:save", 4, half_a_checkpoint), checkpoint_seconds=0)
    steps = [path.name for path in checkpoints.checkpoints(tmp_path)]
    assert steps == ["checkpoint-00000002.pt", "checkpoint-00000003.pt"]
    assert continued(name, tmp_path)["continued"] == 1


def test_a_run_killed_again_and_again_ends_as_if_never_killed(tmp_path, continued):
    for _ in range(3):
        killed(tmp_path, "ekfac", (STEP, 3, die), checkpoint_seconds=0)
    assert continued("ekfac", tmp_path)["continued"] == 3


def test_what_a_kill_left_behind_is_removed_when_the_run_is_over(tmp_path):
    """Half a checkpoint of a step at which the continued run saves none; the last checkpoints."""
    half = ("torch:save", 4, half_a_checkpoint)
    killed(tmp_path, "sgd", half, checkpoint_seconds=0)
    assert list(tmp_path.glob("*.unfinished"))
    run(RUNS["sgd"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_checkpoints_of_a_run_killed_after_its_record_are_removed_the_next_time(tmp_path):
    killed(tmp_path, "sgd", MOMENTS["the record written, checkpoints there"])
    before = (tmp_path / "record.json").stat().st_mtime_ns
    run(RUNS["sgd"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]
    assert (tmp_path / "record.json").stat().st_mtime_ns == before


# Ctrl-C and SIGTERM


def send(number, times=1):
    """Something that sends this process a signal."""

    def sending(*_, **__):
        for _ in range(times):
            os.kill(os.getpid(), number)

    return sending


def stop_the_command(folder, name, where, call, number, times, options):
    """In another process: the command itself, sent a signal."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if pytest is in background
    write_output_to(folder.parent / "output")
    Nth(where, call, send(number, times))
    c = RUNS[name]
    command_line.sys.argv = ["tekfac-edu", "train", "--model", c.model, "--dataset", c.dataset]
    for option in ("optimizer", "lr", "epochs", "batch_size", "interval", "warmup"):
        command_line.sys.argv += [f"--{option.replace('_', '-')}", str(getattr(c, option))]
    command_line.sys.argv += ["--widths", *map(str, c.widths), "--folder", str(folder), *options]
    command_line.main()


def interrupted(folder, name, where, call, number=signal.SIGINT, times=1, options=()):
    """Exit code and output."""
    arguments = folder, name, where, call, number, times, options
    code = in_process(stop_the_command, *arguments)
    return code, (folder.parent / "output").read_text()


@pytest.mark.parametrize("name", ["sgd", "tekfac"])  # that every kind continues: above
def test_ctrl_c_within_an_epoch_saves_that_step_and_says_how_to_go_on(name, tmp_path, continued):
    folder = tmp_path / "run"
    code, output = interrupted(folder, name, STEP, STEPS + 2)
    assert code == 1
    assert "Traceback" not in output
    assert f"tekfac-edu: stopped after step {STEPS + 2} and saved in {folder}" in output
    assert "the same command continues" in output
    assert f"checkpoint-{STEPS + 2:08d}.pt" == checkpoints.checkpoints(folder)[-1].name
    assert continued(name, folder)["continued"] == 1


def test_sigterm_does_the_same(tmp_path, continued):
    folder = tmp_path / "run"
    code, output = interrupted(folder, "tekfac", STEP, 2, signal.SIGTERM)
    assert code == 1
    assert output.splitlines()[-1].startswith("tekfac-edu: stopped after step 2 and saved in")
    continued("tekfac", folder)


def test_the_same_command_continues_indeed(tmp_path, continued):
    folder = tmp_path / "run"
    interrupted(folder, "sgd", STEP, 2)
    code, output = interrupted(folder, "sgd", STEP, 99)  # never
    assert code == 0
    assert output.splitlines()[-1].startswith("finished: training loss ")
    record = json.loads((folder / "record.json").read_text())
    assert record["continued"] == 1
    assert record["command"].startswith("tekfac-edu train --model mlp")
    plain = run(RUNS["sgd"], tmp_path / "another")
    assert numbers(record) == numbers(plain)


def test_ctrl_c_in_an_evaluation_stops_after_it(tmp_path, continued):
    folder = tmp_path / "run"
    code, output = interrupted(folder, "tekfac", f"{TRAINING}:evaluate", 1)
    assert code == 1 and f"stopped after step {STEPS} " in output
    continued("tekfac", folder)


def test_ctrl_c_while_saving_lets_it_save(tmp_path, continued):
    folder = tmp_path / "run"
    code, output = interrupted(folder, "tekfac", "torch:save", 1)
    assert code == 1 and f"stopped after step {STEPS + 1} " in output
    continued("tekfac", folder)


def test_ctrl_c_in_the_last_evaluation_changes_nothing(tmp_path):
    code, output = interrupted(tmp_path / "run", "sgd", f"{TRAINING}:evaluate", 2)
    assert code == 0 and "finished" in output
    assert (tmp_path / "run" / "record.json").exists()


@pytest.mark.parametrize("function", ["build_images", "load_checkpoint"])
def test_ctrl_c_before_training_stops_at_once(function, tmp_path):
    """A download may take long, and there is nothing to save."""
    folder = tmp_path / "run"
    code, output = interrupted(folder, "sgd", f"{TRAINING}:{function}", 1)
    assert code == 130
    assert "Traceback" not in output and "stopped at once" in output
    assert not checkpoints.checkpoints(folder)


def test_a_second_ctrl_c_stops_at_once_and_what_was_saved_before_stays(tmp_path, continued):
    folder = tmp_path / "run"
    code, output = interrupted(folder, "tekfac", STEP, STEPS + 2, times=2)
    assert code == 130
    assert "Traceback" not in output and "stopped at once" in output
    assert [path.name for path in checkpoints.checkpoints(folder)] == ["checkpoint-00000005.pt"]
    continued("tekfac", folder)


def test_signals_are_given_back_afterwards(tmp_path):
    def ours(number, frame):
        raise AssertionError

    before = {number: signal.signal(number, ours) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        run(RUNS["sgd"], tmp_path)
        assert all(signal.getsignal(number) is ours for number in before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_tensorboard_has_every_epoch_once_after_a_kill(tmp_path):
    """Also an epoch that was written, and then lost before its checkpoint."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator

    assert in_process(stop_with_tensorboard, tmp_path) == -signal.SIGKILL
    (events,) = tmp_path.glob("events.*")  # named by the second: else of the same one
    events.rename(tmp_path / "events.out.tfevents.1.before")
    record = run(RUNS["sgd"], tmp_path, tensorboard=True)
    events = accumulator(str(tmp_path))
    events.Reload()
    scalars = events.Scalars("train_loss")
    assert [event.step for event in scalars] == [1, 2]
    losses = [epoch["train_loss"] for epoch in record["epochs"]]
    assert [event.value for event in scalars] == pytest.approx(losses, rel=1e-5)


def stop_with_tensorboard(folder):
    torch.set_num_threads(1)
    Nth("torch:save", 2, half_a_checkpoint)
    run(RUNS["sgd"], folder, tensorboard=True)
