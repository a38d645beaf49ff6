"""If this fails, optimizers are not tuned alike, or tuning misses minima or sees test images."""

import json
import math
from dataclasses import replace

import pytest
import torch

from tekfac_edu.experiments import building, training, tuning
from tekfac_edu.experiments.methods import KRONECKER, OPTIMIZERS
from tekfac_edu.experiments.racing import race, settings_of
from tekfac_edu.experiments.records import read_races
from tekfac_edu.experiments.tuning import compass_search, tune

from . import poisoned, tiny_preset

HOW = {"device": "cpu", "bar": False}
START = {"lr": 0.1, "damping": 0.01, "weight_decay": 5e-4}


class Judge:
    """A function of a point that remembers where it was asked."""

    def __init__(self, function):
        self.function, self.asked = function, []

    def __call__(self, point):
        self.asked.append(dict(point))
        return self.function(point)


def bowl(**centre):
    """Squared distance in decades."""

    def loss(point):
        return sum(math.log10(point[name] / value) ** 2 for name, value in centre.items())

    return Judge(loss)


def off(point, **centre):
    return max(abs(math.log10(point[name] / value)) for name, value in centre.items())


@pytest.mark.parametrize(
    "centre",
    [
        {"lr": 0.1, "damping": 0.01},
        {"lr": 0.23, "damping": 0.004},
        {"lr": 8.0, "damping": 30.0},
        {"lr": 1e-5, "damping": 1e-6},
    ],
)
def test_the_minimum_of_a_bowl_is_found_however_far_it_is(centre):
    """To an eighth of a first step and the rounding to two digits (5 % or 0.02 decades)."""
    judge = bowl(**centre)
    best, loss, _ = compass_search(judge, START, ["lr", "damping"], 80)
    assert off(best, lr=centre["lr"]) < 0.5 / 8 / 2 + 0.022
    assert off(best, damping=centre["damping"]) < 1.0 / 8 / 2 + 0.022
    assert loss == judge.function(best)
    assert best["weight_decay"] == START["weight_decay"]


@pytest.mark.parametrize("trials", [1, 2, 3, 5, 8, 12, 20, 30])
@pytest.mark.parametrize("coordinates", [["lr"], ["lr", "damping"], list(START)])
def test_every_search_has_its_trials_no_more_no_fewer_and_none_twice(coordinates, trials):
    for centre in ({"lr": 0.1}, {"lr": 3.0}, {"lr": 0.027, "damping": 0.3}):
        judge = bowl(**centre)
        compass_search(judge, START, coordinates, trials)
        assert len(judge.asked) == trials
        assert len({tuple(point.items()) for point in judge.asked}) == trials
        assert judge.asked[0] == START


def test_the_best_of_all_trials_is_returned():
    judge = bowl(lr=0.027, damping=0.3)
    for trials in range(1, 15):
        judge.asked.clear()
        best, loss, _ = compass_search(judge, START, ["lr", "damping"], trials)
        losses = [judge.function(point) for point in judge.asked]
        assert loss == min(losses) and best == judge.asked[losses.index(loss)]


def test_neighbours_are_half_a_decade_and_a_decade_away():
    judge = Judge(lambda point: 0.0 if point == START else 1.0)
    best, loss, closed = compass_search(judge, START, list(START), 7)
    assert (best, loss, closed) == (START, 0.0, True)
    neighbours = {"lr": (0.32, 0.032), "damping": (0.1, 0.001), "weight_decay": (5e-3, 5e-5)}
    expected = [START | {name: value} for name in START for value in neighbours[name]]
    assert judge.asked[1:] == expected


def test_when_all_neighbours_are_worse_it_looks_nearer():
    judge = Judge(lambda point: 0.0 if point == START else 1.0)
    *_, closed = compass_search(judge, START, ["lr"], 2)
    assert not closed
    best, _, closed = compass_search(judge, START, ["lr"], 5)
    assert best == START and closed
    assert [point["lr"] for point in judge.asked[-2:]] == [0.18, 0.056]


def test_two_valleys_ties_go_to_the_earlier():
    best, *_ = compass_search(Judge(lambda point: 1.0), START, ["lr", "damping"], 9)
    assert best == START


def test_what_diverges_is_left():
    """From inside the wall, and from a start beyond it."""

    def walled(point):
        return math.inf if point["lr"] > 0.05 else abs(math.log10(point["lr"] / 0.032))

    best, loss, _ = compass_search(Judge(walled), START, ["lr"], 8)
    assert best["lr"] == 0.032 and loss == 0.0
    judge = Judge(lambda point: math.inf)
    _, loss, _ = compass_search(judge, START, ["lr", "damping"], 9)
    assert math.isinf(loss) and len(judge.asked) == 9


@pytest.mark.parametrize("start", [1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001])
def test_half_decades_from_a_start_of_one_digit_come_back_to_it(start):
    """Else a search would pay for the same point twice, under another name."""
    for factor in (10**0.5, 10**-0.5):
        value, seen = start, [start]
        for _ in range(6):
            value = tuning._rounded(value * factor)
            seen.append(value)
        back = [value]
        for _ in range(6):
            value = tuning._rounded(value / factor)
            back.append(value)
        assert back == seen[::-1]


# tune


@pytest.fixture
def trained(monkeypatch):
    """Configurations for which `train` had something to do."""
    done, train = [], training.train

    def counted(configuration, folder, *arguments, **named):
        if not (folder / "record.json").exists():
            done.append(configuration)
        return train(configuration, folder, *arguments, **named)

    monkeypatch.setattr(training, "train", counted)
    return done


def test_every_optimizer_has_the_same_trials_on_a_held_out_part(tmp_path, monkeypatch, trained):
    """With test labels that cannot be looked at without an error."""
    monkeypatch.setattr(building, "_load", lambda *_: poisoned())
    lines = []
    tuned = tune(tiny_preset(), tmp_path, trials=4, progress=lines.append, **HOW)
    assert list(tuned) == list(OPTIMIZERS) and len(lines) == 6
    assert [line.split(":")[0] for line in lines] == list(OPTIMIZERS)
    for optimizer in OPTIMIZERS:
        trials = [c for c in trained if c.optimizer == optimizer]
        assert len(trials) == len(set(trials)) == 4
        assert {(c.epochs, c.held_out, c.seed) for c in trials} == {(1, True, 1000)}
        assert len({c.damping for c in trials}) == 1 or optimizer in KRONECKER
        assert {c.weight_decay for c in trials} == {0.0}
    runs, trials = read_races([tmp_path])
    assert not runs and len(trials) == 24
    assert {(t["train_images"], t["test_images"]) for t in trials} == {(1293, 144)}
    for optimizer, settings in tuned.items():
        ours = [t for t in trials if t["configuration"]["optimizer"] == optimizer]
        best = min(ours, key=lambda trial: trial["epochs"][-1]["test_loss"])["configuration"]
        assert settings == {name: best[name] for name in settings}
    with pytest.raises((IndexError, RuntimeError)):  # the poison is one: a race looks at it
        race(tiny_preset(), tmp_path, ["sgd"], [0], **HOW)


def test_every_optimizer_has_the_same_search(tmp_path, monkeypatch):
    """With damping where there is one, and weight decay where the preset says so."""
    searches = []

    def search(judged, start, coordinates, trials):
        searches.append((start, coordinates, trials))
        return start, 1.0, True

    monkeypatch.setattr(tuning, "compass_search", search)
    for decay in (False, True):
        preset = tiny_preset(weight_decay=decay)
        tune(preset, tmp_path, progress=lambda line: None, **HOW)
        for optimizer, searched in zip(OPTIMIZERS, searches, strict=True):
            coordinates = ["lr"] + ["damping"] * (optimizer in KRONECKER)
            coordinates += ["weight_decay"] * decay
            assert searched == (preset.starts[optimizer], coordinates, 12)
        searches.clear()


def test_the_held_out_part_is_of_the_training_images_and_not_trained_on():
    configuration = tiny_preset().base.replace(held_out=True)
    images, whole = building.build_images(configuration, None, "cpu"), poisoned()
    parts = torch.cat([images.x_train, images.x_test]).flatten(1)
    originals = whole.x_train.flatten(1)
    assert sorted(map(bytes, parts.numpy())) == sorted(map(bytes, originals.numpy()))


def test_tuned_settings_are_those_that_a_race_uses(tmp_path):
    preset = tiny_preset()
    tuned = tune(preset, tmp_path, ["sgd", "kfac"], 4, lambda line: None, **HOW)
    assert json.loads((tmp_path / "tuned.json").read_text()) == tuned
    assert settings_of(preset, tmp_path) == preset.starts | tuned
    assert settings_of(preset, tmp_path / "elsewhere") == preset.starts
    assert set(tuned["kfac"]) == {"lr", "damping", "weight_decay"}
    assert set(tuned["sgd"]) == {"lr", "weight_decay"}
    written = {"sgd": {"lr": 0.07, "weight_decay": 0.0}}
    (tmp_path / "tuned.json").write_text(json.dumps(written))
    (record,) = race(preset, tmp_path, ["sgd"], [0], **HOW)
    assert record["configuration"]["lr"] == 0.07


def test_tuning_again_costs_nothing(tmp_path, trained):
    first = tune(tiny_preset(), tmp_path, ["sgd", "tekfac"], 3, lambda line: None, **HOW)
    assert len(trained) == 6
    second = tune(tiny_preset(), tmp_path, ["sgd", "tekfac"], 3, lambda line: None, **HOW)
    assert second == first and len(trained) == 6
    tune(tiny_preset(), tmp_path, ["sgd"], 5, lambda line: None, **HOW)
    assert len(trained) == 8


def test_tuning_one_optimizer_keeps_what_was_tuned_for_others(tmp_path):
    one = tune(tiny_preset(), tmp_path, ["sgd"], 2, lambda line: None, **HOW)
    other = tune(tiny_preset(), tmp_path, ["adam"], 2, lambda line: None, **HOW)
    assert json.loads((tmp_path / "tuned.json").read_text()) == one | other


def test_weight_decay_is_tuned_where_the_preset_says_so(tmp_path, trained):
    starts = {name: s | {"weight_decay": 5e-4} for name, s in tiny_preset().starts.items()}
    preset = tiny_preset(weight_decay=True, starts=starts)
    tune(preset, tmp_path, ["sgd"], 5, lambda line: None, **HOW)
    assert len({c.weight_decay for c in trained}) > 1


def test_an_optimizer_of_which_every_trial_diverges_is_an_error(tmp_path):
    preset = replace(tiny_preset(), starts={"sgd": {"lr": 1e38, "weight_decay": 0.0}})
    with pytest.raises(ValueError, match="all 3 trials of sgd diverged; start elsewhere"):
        tune(preset, tmp_path, ["sgd"], 3, lambda line: None, **HOW)


def test_no_trials_are_refused(tmp_path):
    with pytest.raises(ValueError, match="trials must be a whole number >= 1; got 0"):
        tune(tiny_preset(), tmp_path, ["sgd"], 0, **HOW)
