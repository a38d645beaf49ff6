"""If this fails, runs side by side end with other numbers, or go on when nobody waits for them.

Workers are real processes, and what stops them are real signals. Where a test does not say
`spawned`, they are forked from a server that has imported torch, which takes seconds, once.
"""

import json
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

from tekfac_edu.experiments import building, checkpoints, command_line, presets, side_by_side
from tekfac_edu.experiments.racing import race
from tekfac_edu.experiments.records import read_races
from tekfac_edu.experiments.side_by_side import one_run, train_with
from tekfac_edu.experiments.tuning import tune

from . import PRELOAD, in_process, numbers, tiny, tiny_preset, write_output_to

HOW = {"device": "cpu", "bar": False}
PAIR = ["sgd", "tekfac"]
THREE = ["sgd"], [0, 1, 2]

needs_sigkill = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")


def quiet(line):
    pass


@pytest.fixture(autouse=True)
def one_thread():
    """As in the workers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def preloaded(monkeypatch):
    """Workers that begin in no time."""
    monkeypatch.setattr(side_by_side, "CONTEXT", from_a_server())


def from_a_server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    forkserver.ensure_running()  # else it begins where signals are blocked, and so for other tests
    return context


def test_a_race_side_by_side_has_the_numbers_of_one_after_another(tmp_path, monkeypatch):
    """Spawned; with a run that diverges; then nothing is left to do, and no process begins."""
    starts = tiny_preset().starts
    starts["sgd"]["lr"] = 1e38
    preset, told = tiny_preset(starts=starts), []
    chosen = PAIR, [0, 1, 1]
    together = race(preset, tmp_path / "two", *chosen, 2, told.append, **HOW)
    apart = race(preset, tmp_path / "one", *chosen, **HOW)
    assert list(map(numbers, together)) == list(map(numbers, apart))
    assert "sgd, seed 0: diverged" in told and len(told) == 6
    last = apart[1]["epochs"][-1]
    assert (
        f"tekfac, seed 0: training loss {last['train_loss']:.4g}, "
        f"test accuracy {last['test_score']:.4g}"
    ) in told
    monkeypatch.setattr(side_by_side, "Worker", None)
    again = race(preset, tmp_path / "two", *chosen, 2, quiet, **HOW)
    assert list(map(numbers, again)) == list(map(numbers, apart))


def test_searches_side_by_side_find_the_same_settings(tmp_path, preloaded):
    chosen, told = ["tekfac", "sgd", "kfac"], []
    together = tune(tiny_preset(), tmp_path / "two", chosen, 4, told.append, 2, **HOW)
    one_by_one = []
    apart = tune(tiny_preset(), tmp_path / "one", chosen, 4, one_by_one.append, **HOW)
    assert together == apart and list(together) == chosen
    assert sorted(told) == sorted(one_by_one)
    written = [(tmp_path / name / "tuned.json").read_bytes() for name in ("two", "one")]
    assert written[0] == written[1]
    trials = [read_races([tmp_path / name])[1] for name in ("two", "one")]
    assert list(map(numbers, trials[0])) == list(map(numbers, trials[1]))


def train_and_tell(*run):
    """In a worker: its record, with how often images were loaded and read from the cache."""
    record = train_with(*run)
    loaded = building._load.cache_info()
    return record | {"loaded": (os.getpid(), loaded.misses, loaded.hits)}


def test_a_worker_loads_images_once_and_an_error_is_what_it_was(tmp_path, preloaded):
    lines = [one_run(tiny("sgd", seed=seed), tmp_path / str(seed), HOW) for seed in range(3)]
    records = side_by_side.side_by_side(lines, 1, train_and_tell)
    (worker,) = {record["loaded"][0] for record in records}
    assert worker != os.getpid()
    assert [record["loaded"][1:] for record in records] == [(1, 0), (1, 1), (1, 2)]
    preset = tiny_preset(base=tiny(dataset="cifar10"))
    with pytest.raises(ValueError, match="there is no folder /no/where"):
        race(preset, tmp_path, ["sgd"], [0], 2, quiet, data_folder="/no/where", **HOW)
    assert not multiprocessing.active_children()


# stopped


def long_preset():
    """Runs that take seconds."""
    return tiny_preset(base=tiny(epochs=100))


def begun(folder):
    """Folders of runs that have been trained for a while and are not finished."""
    return [
        run
        for run in folder.glob("runs/*")
        if checkpoints.checkpoints(run) and not (run / "record.json").exists()
    ]


def once(condition, act):
    """Do something in another thread when something holds."""

    def watch():
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)
        act()

    threading.Thread(target=watch, daemon=True).start()


def compare(folder, way):
    """In another process, the first of its group: the command, two runs at once, and signals."""
    when, to_all, signals = WAYS[way]
    torch.set_num_threads(1)
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    write_output_to(folder.parent / "output")
    presets.PRESETS["digits-mlp"] = long_preset()
    if not to_all:
        side_by_side.CONTEXT = from_a_server()

    def importing():
        return len(multiprocessing.active_children()) == 2

    def training():
        return importing() and len(begun(folder)) >= (1 if to_all else 2)

    def act():
        workers = [child.pid for child in multiprocessing.active_children()]
        (folder.parent / "processes").write_text(json.dumps([os.getpid(), *workers]))
        if when == "importing":
            time.sleep(0.5)
        for name in signals:
            (os.killpg if to_all else os.kill)(os.getpid(), getattr(signal, name))
            time.sleep(0.1)

    once(importing if when == "importing" else training, act)
    options = "--optimizers sgd --seeds 0 1 2 --device cpu --at-once 2 --folder".split()
    command_line.sys.argv = ["tekfac-edu", "compare", "digits-mlp", *options, str(folder)]
    command_line.main()


def left(processes):
    """Which of them and of their groups run; a dead one may wait for whoever reaps it."""
    running = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # gone meanwhile
            continue
        if state != "Z" and not {int(stat.parent.name), int(group)}.isdisjoint(processes):
            running.append(int(stat.parent.name))
    return running


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Numbers of a race never stopped."""
    folder = tmp_path_factory.mktemp("unbroken")
    torch.set_num_threads(1)
    return list(map(numbers, race(long_preset(), folder, *THREE, **HOW)))


# to the parent alone; or to all, as a terminal, timeout and schedulers do, and workers are spawned:
# then two runs train, or one, and the other may be far
WAYS = {
    "SIGTERM": ("training", False, ["SIGTERM"]),
    "SIGKILL": ("training", False, ["SIGKILL"]),
    "to all": ("training", True, ["SIGTERM", "SIGTERM"]),
    "to all that import": ("importing", True, ["SIGINT", "SIGTERM", "SIGTERM"]),
}


@needs_sigkill
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="looks into /proc")
@pytest.mark.parametrize("way", WAYS)
def test_a_race_that_is_stopped_leaves_no_process_and_continues(way, tmp_path, unbroken):
    folder = tmp_path / "race"
    code = in_process(compare, folder, way)
    output = (tmp_path / "output").read_text()
    assert "Traceback" not in output and "out of memory" not in output
    processes = json.loads((tmp_path / "processes").read_text())
    assert len(processes) == 3
    assert way == "SIGKILL" or not set(processes) & set(left(processes))
    deadline = time.monotonic() + 20
    while left(processes) and time.monotonic() < deadline:
        time.sleep(0.05)  # workers without a parent, helpers of multiprocessing
    assert not left(processes)
    stopped = len(begun(folder))
    assert code == (-signal.SIGKILL if way == "SIGKILL" else 1)
    if code == 1:
        said = output[output.index("tekfac-edu: stopped") :].splitlines()
        assert len(said) == max(1, stopped)
        for line in said:
            assert "the same command " in line and ("stopped after step" in line or not stopped)
    assert stopped == 2 or way.startswith("to all")
    assert stopped >= 1 or way == "to all that import"
    records = race(long_preset(), folder, *THREE, **HOW)
    assert list(map(numbers, records)) == unbroken
    assert sum(record["continued"] for record in records) == stopped


@needs_sigkill
def test_a_worker_that_dies_is_named_and_the_other_saves_itself(tmp_path, preloaded):
    once(lambda: len(begun(tmp_path)) == 2, lambda: multiprocessing.active_children()[0].kill())
    with pytest.raises(ChildProcessError, match="was killed by signal 9") as died:
        race(long_preset(), tmp_path, *THREE, 2, quiet, **HOW)
    assert any(str(run) in str(died.value) for run in begun(tmp_path))
    assert "the same command continues" in str(died.value)
    assert len(begun(tmp_path)) == 2 and not multiprocessing.active_children()


# refused


def test_torchrun_and_several_at_once_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for start in (race, tune):
        with pytest.raises(ValueError, match=r"at_once=3 is for one process; torchrun started 2"):
            start(tiny_preset(), tmp_path, at_once=3, **HOW)


@pytest.mark.parametrize("wrong", [0, 1.5, True])
def test_at_once_is_a_whole_number(wrong, tmp_path):
    for start in (race, tune):
        with pytest.raises(ValueError, match="at_once must be a whole number >= 1"):
            start(tiny_preset(), tmp_path, at_once=wrong, **HOW)
