"""If this fails, a damaged checkpoint is trusted, a whole one lost, or a full disk noticed late."""

import errno
import os
import pickle
import shutil
import signal
import warnings

import pytest
import torch

from tekfac_edu.experiments import checkpoints, command_line, training
from tekfac_edu.experiments.building import build_images, build_model, build_optimizer
from tekfac_edu.experiments.checkpoints import (
    check_room,
    expected_bytes,
    load_checkpoint,
    save_checkpoint,
)
from tekfac_edu.experiments.methods import OPTIMIZERS

from . import STEPS, Nth, flipped, in_process, numbers, run, same_bits, tiny, write_output_to


def state(number):
    return {"number": number, "weights": torch.full((100, 100), float(number)), "list": [1, None]}


def filled(folder, count=3):
    for number in range(1, count + 1):
        save_checkpoint(folder, number, state(number))
    return checkpoints.checkpoints(folder)


def test_what_is_saved_comes_back_and_the_last_two_are_kept(tmp_path):
    assert load_checkpoint(tmp_path) is None
    paths = filled(tmp_path, 4)
    assert [path.name for path in paths] == ["checkpoint-00000003.pt", "checkpoint-00000004.pt"]
    assert same_bits(load_checkpoint(tmp_path), state(4))
    assert len(list(tmp_path.iterdir())) == 2


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """The same file, renamed; then the folder."""
    flushed = []

    def fsync(number):
        names = [path.name for path in tmp_path.iterdir()]
        flushed.append((names, os.fstat(number).st_ino))

    monkeypatch.setattr(os, "fsync", fsync)
    save_checkpoint(tmp_path, 7, state(7))
    (path,) = checkpoints.checkpoints(tmp_path)
    assert flushed[0] == ([path.name + ".unfinished"], path.stat().st_ino)
    if os.name == "posix":
        assert flushed[1:] == [([path.name], tmp_path.stat().st_ino)]


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (9, 10, 99, 100):
        save_checkpoint(tmp_path, step, state(step))
    assert load_checkpoint(tmp_path)["number"] == 100


def truncated(path):
    path.write_bytes(path.read_bytes()[:-200])


def emptied(path):
    path.write_bytes(b"")


def replaced(path):
    path.write_bytes(b"something else " * 1000)


def no_checkpoint(path):
    """A whole zip file, but of another kind."""
    shutil.make_archive(path.with_suffix(""), "zip", path.parent, ".")
    path.with_suffix(".zip").replace(path)


DAMAGES = [truncated, emptied, replaced, flipped, no_checkpoint]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_one_is_named_and_the_one_before_used(tmp_path, damage):
    before, last = filled(tmp_path)
    damage(last)
    with pytest.warns(UserWarning, match=f"damaged: {last} .*Going on from {before.name}"):
        assert same_bits(load_checkpoint(tmp_path), state(2))


@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_a_flipped_byte_of_a_tensor_is_noticed(tmp_path, part):
    """torch itself would load it."""
    _, last = filled(tmp_path)
    flipped(last, part)
    assert not torch.equal(torch.load(last, weights_only=True)["weights"], state(3)["weights"])
    with pytest.warns(UserWarning, match="the checksum of .*data/0 is wrong|Bad CRC"):
        assert load_checkpoint(tmp_path)["number"] == 2


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_when_all_are_damaged_all_are_named(tmp_path, damage):
    paths = filled(tmp_path)
    for path in paths:
        damage(path)
    with pytest.raises(ValueError, match="no checkpoint can be read") as error:
        load_checkpoint(tmp_path)
    assert all(str(path) in str(error.value) for path in paths)
    assert "Delete the folder to start again" in str(error.value)


def test_a_whole_one_is_loaded_without_a_word(tmp_path):
    filled(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(tmp_path)


def test_no_code_is_run_on_loading(tmp_path):
    """A checkpoint that somebody else has put there."""
    harmful = tmp_path / "harm"

    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(harmful),)

    torch.save({"weights": Harm()}, tmp_path / "checkpoint-00000001.pt", pickle_module=pickle)
    with pytest.raises(ValueError, match="no checkpoint can be read"):
        load_checkpoint(tmp_path)
    assert not harmful.exists()


def test_after_a_damaged_one_two_whole_ones_are_kept_again(tmp_path):
    """The damaged one has a later step, and must not stay as the newest."""
    _, last = filled(tmp_path, 30)
    flipped(last)
    (tmp_path / "checkpoint-00000028.pt.unfinished").write_bytes(b"half")
    for step in (29, 30):
        (tmp_path / f"checkpoint-{step:08d}.pt").rename(tmp_path / f"checkpoint-{10 * step:08d}.pt")
    save_checkpoint(tmp_path, 295, state(295))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-00000290.pt", "checkpoint-00000295.pt"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_checkpoint(tmp_path)["number"] == 295


# whole runs


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run with two checkpoints, of steps 5 and 7, stopped there."""
    Stop = type("Stop", (Exception,), {})

    def stop(*_):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(training, "CHECKPOINT_SECONDS", 0)
        patch.setattr(training.Run, "_step", training.Run._step)
        Nth("tekfac_edu.experiments.training:Run._step", STEPS + 3, stop)
        with pytest.raises(Stop):
            run(tiny(), tmp_path / "run")
    assert len(checkpoints.checkpoints(tmp_path / "run")) == 2
    return tmp_path / "run"


def test_a_run_with_a_damaged_checkpoint_ends_with_the_same_numbers(stopped, tmp_path):
    flipped(checkpoints.checkpoints(stopped)[-1])
    with pytest.warns(UserWarning, match="damaged: .*checkpoint-00000007.pt"):
        record = run(tiny(), stopped)
    assert numbers(record) == numbers(run(tiny(), tmp_path / "whole"))


def test_a_run_with_both_damaged_is_refused(stopped):
    for path in checkpoints.checkpoints(stopped):
        truncated(path)
    with pytest.raises(ValueError, match=r"checkpoint-00000007\.pt.*checkpoint-00000006\.pt"):
        run(tiny(), stopped)


def test_a_folder_of_another_run_is_refused_with_what_differs(stopped):
    before = [path.stat().st_mtime_ns for path in checkpoints.checkpoints(stopped)]
    with pytest.raises(ValueError, match="holds another run") as error:
        run(tiny(lr=0.25, widths=(9,)), stopped)
    assert "lr: 0.3 there, 0.25 here" in str(error.value)
    assert "widths: (8,) there, (9,) here" in str(error.value)
    assert "seed" not in str(error.value) and "give another folder" in str(error.value)
    assert [path.stat().st_mtime_ns for path in checkpoints.checkpoints(stopped)] == before
    run(tiny(), stopped)
    with pytest.raises(ValueError, match="seed: 0 there, 1 here"):  # its record, too
        run(tiny(seed=1), stopped)


# room


def test_a_full_disk_is_an_error_before_training(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(training.Run, "_step", None)
    with pytest.raises(OSError, match=str(tmp_path)):
        run(tiny(), tmp_path / "run")


def test_room_is_enough_or_not_by_a_byte(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    check_room(tmp_path / "deep" / "er", 1)
    assert list((tmp_path / "deep" / "er").iterdir()) == []
    with pytest.raises(OSError):
        check_room(tmp_path, 2 * free)


def test_a_folder_that_cannot_be_made_is_an_error_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(training.Run, "_step", None)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match=r"cannot write to .*file/run .*give another folder"):
        run(tiny(), tmp_path / "file" / "run")
    with pytest.raises(OSError, match="cannot write to"):
        run(tiny(), tmp_path / "file")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_takes_no_more_than_was_expected(name, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "remove_checkpoints", lambda folder: None)
    configuration = tiny(name, widths=(300, 200), train_images=256, epochs=1)
    run(configuration, tmp_path)
    model = build_model(configuration, build_images(configuration, None, "cpu"))
    expected = expected_bytes(model, build_optimizer(configuration, model))
    (path,) = checkpoints.checkpoints(tmp_path)
    assert path.stat().st_size < expected < 2**20 + 4 * path.stat().st_size


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
ZIP_WRITER = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 576 vs 470")


@pytest.mark.parametrize("error", [NO_SPACE, ZIP_WRITER], ids=["OSError", "RuntimeError"])
def test_a_disk_that_fills_up_says_how_to_go_on_and_loses_nothing(error, tmp_path, monkeypatch):
    folder, save = tmp_path / "run", torch.save

    def full(content, file):
        if content["position"]["epoch"] == 2:
            file.write(b"some of it")
            raise error
        save(content, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="the checkpoint after step 10 could not be") as raised:
            run(tiny(), folder)
    assert str(folder) in str(raised.value) and str(error) in str(raised.value)
    assert "give the same command to continue" in str(raised.value)
    assert [path.name for path in folder.iterdir()] == ["checkpoint-00000005.pt"]
    assert numbers(run(tiny(), folder)) == numbers(run(tiny(), tmp_path / "whole"))


def no_room(folder):
    """In another process: no file can be larger than this after the first epoch."""
    import resource

    torch.set_num_threads(1)
    write_output_to(folder.parent / "output")

    def limit(*_):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    Nth("tekfac_edu.experiments.training:evaluate", 2, limit)
    train = command_line.train
    command_line.train = lambda: train(tiny(), folder, device="cpu", tensorboard=False)
    command_line.sys.argv = ["tekfac-edu", "train"]
    command_line.main()


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no such limit here")
def test_a_real_limit_of_the_system_does_the_same(tmp_path):
    folder = tmp_path / "run"
    assert in_process(no_room, folder) == 1
    output = (tmp_path / "output").read_text()
    assert f"tekfac-edu: the checkpoint after step 10 could not be written to {folder}" in output
    assert "Traceback" not in output
    assert [path.name for path in folder.iterdir()] == ["checkpoint-00000005.pt"]
    assert numbers(run(tiny(), folder)) == numbers(run(tiny(), tmp_path / "whole"))
