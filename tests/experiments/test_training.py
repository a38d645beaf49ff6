"""If this fails, a run trains or reports something else than its configuration says.

What happens to a run that is stopped: test_killed.py.
"""

import json
import time

import pytest
import torch

from tekfac_edu.data.batches import Batches
from tekfac_edu.experiments import building, training
from tekfac_edu.experiments.methods import OPTIMIZERS
from tekfac_edu.experiments.tasks import Classification, evaluate
from tekfac_edu.optim import TEKFAC

from . import STEPS, last_state, numbers, run, same_bits, tiny


@pytest.fixture
def kept(monkeypatch):
    """Keep the checkpoints of finished runs."""
    monkeypatch.setattr(training, "remove_checkpoints", lambda folder: None)


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_a_run_of_sgd_is_a_plain_loop_bit_for_bit(schedule, tmp_path, kept):
    """torch.optim.SGD and torch's schedulers; the record has the mean of the batches' losses.

    That these are the formulas' rates: test_building.py.
    """
    configuration = tiny("sgd", epochs=4, schedule=schedule)
    record = run(configuration, tmp_path)
    images = building.build_images(configuration, None, "cpu")
    batches = Batches(images, 256)
    model = building.build_model(configuration, images)
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
    schedules = torch.optim.lr_scheduler
    scheduler = {
        "cosine": schedules.CosineAnnealingLR(optimizer, 4 * STEPS),
        "step": schedules.MultiStepLR(optimizer, [2 * STEPS, 3 * STEPS]),
        "constant": None,
    }[schedule]
    for epoch, ended in enumerate(record["epochs"]):
        losses = []
        model.train()
        for x, y in batches.epoch(epoch):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if scheduler is not None:
                scheduler.step()
        assert ended["train_loss"] == pytest.approx(sum(losses) / STEPS, rel=1e-5)
        expected = evaluate(Classification(), model, images)
        assert (ended["test_loss"], ended["test_score"]) == pytest.approx(expected, rel=1e-5)
    assert same_bits(last_state(tmp_path)["model"], dict(model.state_dict()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_the_digits(name, tmp_path):
    record = run(tiny(name, epochs=8), tmp_path)
    first, last = record["epochs"][0], record["epochs"][-1]
    assert last["train_loss"] < 0.7 * first["train_loss"]
    assert last["test_score"] > 0.5  # with 8 units, in 40 steps


def test_the_same_configuration_gives_the_same_numbers_and_another_seed_others(tmp_path):
    one, again = (run(tiny(), tmp_path / name) for name in ("one", "again"))
    assert numbers(one) == numbers(again)
    other = run(tiny(seed=1), tmp_path / "other")
    assert numbers(other)["epochs"] != numbers(one)["epochs"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bf16_is_used_and_stays_near(name, tmp_path):
    """Eight bits: losses near those of float32, but not the same."""
    whole = run(tiny(name), tmp_path / "whole")["epochs"][-1]
    half = run(tiny(name, bf16=True), tmp_path / "half")["epochs"][-1]
    assert half["train_loss"] != whole["train_loss"]
    assert half["train_loss"] == pytest.approx(whole["train_loss"], rel=0.1)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("fisher", ["mc", "exact"])
@pytest.mark.parametrize("model", ["mlp", "autoencoder"])
def test_other_fishers_are_used(model, fisher, bf16, tmp_path):
    """Of the categorical and of the Bernoulli likelihood."""
    settings = {"model": model, "lr": 0.3 if model == "mlp" else 1e-3, "bf16": bf16, "epochs": 1}
    record = run(tiny(fisher=fisher, **settings), tmp_path / fisher)
    empirical = run(tiny(**settings), tmp_path / "empirical")
    assert record["status"] == "finished"
    assert record["epochs"][-1]["train_loss"] != empirical["epochs"][-1]["train_loss"]


@pytest.mark.parametrize("model", ["mlp", "autoencoder"])
def test_the_fisher_is_of_the_tasks_own_likelihood(model, tmp_path, monkeypatch):
    seen = []

    def accumulate(self, outputs, likelihood):
        seen.append((likelihood, outputs.dtype))
        raise RuntimeError("enough")

    monkeypatch.setattr(TEKFAC, "accumulate_fisher", accumulate)
    with pytest.raises(RuntimeError, match="enough"):
        run(tiny(model=model, fisher="mc", bf16=True), tmp_path)
    likelihood = {"mlp": "categorical", "autoencoder": "bernoulli"}[model]
    assert seen == [(likelihood, torch.float32)]


def test_an_autoencoder_reports_its_reconstruction_error(tmp_path):
    record = run(tiny("adam", model="autoencoder", lr=0.003, epochs=4), tmp_path)
    assert record["score"] == "error"
    errors = [epoch["test_score"] for epoch in record["epochs"]]
    assert errors[-1] < errors[0]
    assert 0 < errors[-1] < 64


def test_seconds_are_of_training_alone(tmp_path, monkeypatch):
    """Evaluations that take a second each; the training between them takes milliseconds."""

    def slow(*arguments):
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass
        time.sleep(1.0)
        return evaluate(*arguments)

    monkeypatch.setattr(training, "evaluate", slow)
    last = run(tiny("sgd"), tmp_path)["epochs"][-1]
    assert 0 < last["seconds"] < 1.3
    assert 0 < last["cpu_seconds"] < 0.3


def test_seconds_go_on_where_a_continued_run_left_off(tmp_path, monkeypatch):
    steps = training.Run._step

    def slow(self, x, y):
        if self.step == STEPS and not self.position.continued:
            raise KeyboardInterrupt
        time.sleep(0.05 * (self.position.epoch == 0))
        return steps(self, x, y)

    monkeypatch.setattr(training.Run, "_step", slow)
    with pytest.raises(KeyboardInterrupt):
        run(tiny("sgd"), tmp_path)
    first, last = run(tiny("sgd"), tmp_path)["epochs"]
    assert 5 * 0.05 < first["seconds"] < last["seconds"] < 5 * 0.05 + first["seconds"]


@pytest.mark.parametrize("name", ["sgd", "tekfac"])
def test_a_run_that_diverges_ends_and_says_so(name, tmp_path):
    record = run(tiny(name, lr=1e38, epochs=6), tmp_path)
    assert record["status"] == "diverged"
    assert len(record["epochs"]) < 6
    assert None in (record["epochs"][-1]["train_loss"], record["epochs"][-1]["test_loss"])
    text = (tmp_path / "record.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert numbers(json.loads(text)) == numbers(record)
    assert run(tiny(name, lr=1e38, epochs=6), tmp_path) == json.loads(text)


def test_a_finished_run_is_returned_not_run_again(tmp_path, monkeypatch):
    record = run(tiny("sgd"), tmp_path)
    before = (tmp_path / "record.json").stat().st_mtime_ns
    monkeypatch.setattr(training, "Run", None)
    assert numbers(run(tiny("sgd"), tmp_path)) == numbers(record)
    assert (tmp_path / "record.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("cheap", [True, False])
def test_checkpoints_that_take_long_are_not_made_after_every_epoch(cheap, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(training, "save_checkpoint", lambda folder, step, state: saved.append(step))
    monkeypatch.setattr(training, "CHEAP_SECONDS", 100.0 if cheap else -1.0)
    monkeypatch.setattr(training, "CHEAP_SHARE", 0.0)
    run(tiny("sgd", epochs=4), tmp_path)
    assert saved == ([5, 10, 15, 20] if cheap else [])


def test_a_bar_is_shown_where_somebody_looks(tmp_path, monkeypatch):
    shown = []
    tqdm = training.tqdm

    def noted(**named):
        shown.append(named["disable"])
        return tqdm(**named | {"disable": 1})

    monkeypatch.setattr(training, "tqdm", noted)
    for bar in (True, False):
        training.train(tiny("sgd"), tmp_path / str(bar), device="cpu", bar=bar)
    assert shown == [None, True]  # None: if standard error is a terminal


def test_mc_on_several_processes_is_refused(tmp_path):
    here = training.processes("cpu")
    with here as alone:
        many = type(alone)(alone.device, 0, 2)
        with pytest.raises(ValueError, match='fisher "mc" on several processes'):
            training.Run(tiny(fisher="mc"), tmp_path, None, many)


def test_a_gpu_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device cuda was asked for.*use --device cpu"):
        training.train(tiny("sgd"), tmp_path / "run", device="cuda", bar=False)
    assert not (tmp_path / "run").exists()
