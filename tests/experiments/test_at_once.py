"""If this fails, several runs at once end with other numbers, or go on when nobody waits for them.

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

from tekfac_edu.experiments import at_once, building, checkpoints, command_line, presets, training
from tekfac_edu.experiments.at_once import AtOnce
from tekfac_edu.experiments.racing import race
from tekfac_edu.experiments.records import read_races
from tekfac_edu.experiments.tuning import tune

from . import PRELOAD, in_process, numbers, tiny, tiny_preset, write_output_to

OPTIONS = {"device": "cpu", "bar": False}
PAIR = ["sgd", "tekfac"]
THREE = ["sgd"], [0, 1, 2]

needs_sigkill = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
pytestmark = pytest.mark.usefixtures("one_thread")  # as in the workers


@pytest.fixture
def preloaded(monkeypatch):
    """Workers that begin in no time."""
    monkeypatch.setattr(at_once, "CONTEXT", from_a_server())


def from_a_server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    forkserver.ensure_running()  # else it begins where signals are blocked, and so for other tests
    return context


def test_a_race_at_once_has_the_numbers_of_one_after_another(tmp_path, preloaded, monkeypatch):
    """With a run that diverges; then nothing is left to do, and no process begins."""
    starts = tiny_preset().starts
    starts["sgd"]["lr"] = 1e38
    preset, lines, again = tiny_preset(starts=starts), [], []
    chosen = PAIR, [0, 1, 1]
    together = race(preset, tmp_path / "two", *chosen, 2, lines.append, **OPTIONS)
    apart = race(preset, tmp_path / "one", *chosen, progress=again.append, **OPTIONS)
    assert list(map(numbers, together)) == list(map(numbers, apart))
    assert "sgd, seed 0: diverged" in lines and len(lines) == 6
    assert sorted(lines) == sorted(again)
    last = apart[1]["epochs"][-1]
    assert (
        f"tekfac, seed 0: training loss {last['train_loss']:.4g}, "
        f"test accuracy {last['test_score']:.4g}"
    ) in lines
    monkeypatch.setattr(AtOnce, "call", None)
    again = race(preset, tmp_path / "two", *chosen, 2, **OPTIONS)
    assert list(map(numbers, again)) == list(map(numbers, apart))


def test_searches_at_once_find_the_same_settings(tmp_path, preloaded):
    chosen, lines = ["tekfac", "sgd", "kfac"], []
    together = tune(tiny_preset(), tmp_path / "two", chosen, 4, lines.append, 2, **OPTIONS)
    one_by_one = []
    apart = tune(tiny_preset(), tmp_path / "one", chosen, 4, one_by_one.append, **OPTIONS)
    assert together == apart and list(together) == chosen
    assert sorted(lines) == sorted(one_by_one)
    written = [(tmp_path / name / "tuned.json").read_bytes() for name in ("two", "one")]
    assert written[0] == written[1]
    trials = [read_races([tmp_path / name])[1] for name in ("two", "one")]
    assert list(map(numbers, trials[0])) == list(map(numbers, trials[1]))


def images_of(configuration):
    """In a worker: who it is, and how often images were loaded, and read from the cache."""
    building.build_images(configuration, None, "cpu")
    loaded = building._load.cache_info()
    return os.getpid(), loaded.misses, loaded.hits


def test_a_worker_loads_images_once_and_an_error_is_what_it_was(tmp_path, preloaded):
    with AtOnce(2, **OPTIONS) as runs:

        def three(name):
            return [runs.call(name, images_of, tiny(seed=seed)) for seed in range(3)]

        ((begun, *_),) = [found] = runs.map(three, ["one"])
    assert {worker for worker, *_ in found} == {begun[0]} != {os.getpid()}
    assert [counts for _, *counts in found] == [[1, 0], [1, 1], [1, 2]]
    preset = tiny_preset(base=tiny(dataset="cifar10"))
    with pytest.raises(ValueError, match="there is no folder /no/where"):
        race(preset, tmp_path, ["sgd"], [0], 2, data_folder="/no/where", **OPTIONS)
    assert not multiprocessing.active_children()


def waited(seconds):
    """In a worker: when it began and ended."""
    begun = time.monotonic()
    time.sleep(seconds)
    return begun, time.monotonic()


def test_as_many_are_at_work_at_a_time_as_was_said(preloaded):
    with AtOnce(2, **OPTIONS) as runs:
        spans = runs.map(lambda name: runs.call(name, waited, 0.1), range(5))
    busy = [sum(begun <= moment < ended for begun, ended in spans) for moment, _ in spans]
    assert max(busy) == 2


def test_one_at_a_time_is_here_in_order_and_an_error_ends_it():
    asked = []

    def noted(item):
        asked.append((item, os.getpid()))
        if item == "wrong":
            raise KeyError(item)
        return item

    with AtOnce(1, **OPTIONS) as runs:
        found = runs.map(lambda item: runs.call(item, noted, item), "abc")
        assert found == ["a", "b", "c"] and asked == [(item, os.getpid()) for item in "abc"]
        with pytest.raises(KeyError, match="wrong"):
            runs.map(lambda item: runs.call(item, noted, item), ["d", "wrong", "e"])
    assert [item for item, _ in asked[3:]] == ["d", "wrong"]


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
    building.torch.set_num_threads(1)
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    write_output_to(folder.parent / "output")
    presets.PRESETS["digits-mlp"] = long_preset()
    if not to_all:
        at_once.CONTEXT = from_a_server()

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
    building.torch.set_num_threads(1)
    return list(map(numbers, race(long_preset(), folder, *THREE, **OPTIONS)))


# to the parent alone; or to all, as a terminal, timeout and schedulers do, and workers are spawned:
# then two runs train, or one, and the other may be far
WAYS = {
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
    records = race(long_preset(), folder, *THREE, **OPTIONS)
    assert list(map(numbers, records)) == unbroken
    assert sum(record["continued"] for record in records) == stopped


def two_begun(folder):
    return lambda: len(begun(folder)) == 2


def test_what_stops_the_parent_alone_stops_every_run(tmp_path, preloaded, unbroken):
    once(two_begun(tmp_path), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(training.Interrupted) as stopped:
        race(long_preset(), tmp_path, *THREE, 2, **OPTIONS)
    folders = begun(tmp_path)
    assert len(folders) == 2 and not multiprocessing.active_children()
    lines = str(stopped.value).splitlines()
    assert len(lines) == 2 and all("the same command continues" in line for line in lines)
    assert all(any(f"saved in {folder};" in line for line in lines) for folder in folders)
    records = race(long_preset(), tmp_path, *THREE, **OPTIONS)
    assert list(map(numbers, records)) == unbroken
    assert sum(record["continued"] for record in records) == 2


@needs_sigkill
def test_a_second_ctrl_c_kills_every_run(tmp_path, preloaded, monkeypatch):
    """Of runs that would not save themselves."""

    def insist():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)

    monkeypatch.setattr(AtOnce, "let_go", lambda runs: None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    once(two_begun(tmp_path), insist)
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            race(long_preset(), tmp_path, *THREE, 2, **OPTIONS)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 10
    assert len(begun(tmp_path)) == 2 and not multiprocessing.active_children()


@needs_sigkill
def test_a_worker_that_dies_is_named_and_the_other_saves_itself(tmp_path, preloaded):
    once(two_begun(tmp_path), lambda: multiprocessing.active_children()[0].kill())
    with pytest.raises(ChildProcessError, match=r"the process of .* died") as died:
        race(long_preset(), tmp_path, *THREE, 2, **OPTIONS)
    assert sum(f"{run} died" in str(died.value) for run in begun(tmp_path)) == 1
    assert "the same command continues" in str(died.value)
    assert len(begun(tmp_path)) == 2 and not multiprocessing.active_children()


# refused


def test_torchrun_and_several_at_once_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for start in (race, tune):
        with pytest.raises(ValueError, match=r"at_once=3 is for one process; torchrun started 2"):
            start(tiny_preset(), tmp_path, at_once=3, **OPTIONS)


@pytest.mark.parametrize("wrong", [0, 1.5, True])
def test_at_once_is_a_whole_number(wrong, tmp_path):
    for start in (race, tune):
        with pytest.raises(ValueError, match="at_once must be a whole number >= 1"):
            start(tiny_preset(), tmp_path, at_once=wrong, **OPTIONS)
