"""If this fails, a run with drawn statistics and turns is not the same run twice."""

import copy

import pytest
import torch

from tekfac_edu.optim import Cost
from tekfac_edu.optim.batch import LayerBatch

from .networks import batches, cnn
from .scenarios.copying import every_way
from .scenarios.resuming import assert_resumes_from_any_step
from .training import assert_same_bits, every_method, everything, seeded, train

STEPS = 8
STREAM = list(batches((1, 6, 6), STEPS))
DRAWN = {"factor_rows": 2, "eigenvalue_examples": 5, "stagger": True}
PERIODS = {"interval": (2, 4, 2), "warmup": 2}
every_fisher = pytest.mark.parametrize("fisher", ["empirical", "mc", "exact"])


def build(method, fisher="empirical", model=None, seed=4, schedule=PERIODS, **changed):
    model = model or cnn()
    settings = {"damping": 0.1, "fisher": fisher, "cost": Cost(**DRAWN | changed)}
    with seeded(seed):
        return model, method(model, 0.005, **settings, **schedule)


def draws_of(monkeypatch):
    """What is drawn from now on: a list of (positions of the grids, examples), chunk by chunk."""
    drawn, ordinary = [], LayerBatch.chunks

    def watched(self, *args, **kwargs):
        for examples in ordinary(self, *args, **kwargs):
            grids = tuple(grid and (grid.steps, grid.offsets) for grid in examples.grids)
            chosen = None if examples.chosen is None else tuple(examples.chosen.tolist())
            drawn.append((grids, chosen))
            yield examples

    monkeypatch.setattr(LayerBatch, "chunks", watched)
    return drawn


@every_fisher
@every_method
def test_the_same_run_twice_whatever_torch_s_own_generator_does(method, fisher):
    ends = []
    for seed in (1, 2):
        model, optimizer = build(method, fisher)
        with seeded(seed):
            torch.rand(seed)
            train(model, optimizer, STREAM)
        ends.append(everything(model, optimizer))
    assert_same_bits(*ends)


@every_fisher
@every_method
def test_torch_s_own_generator_is_left_alone(method, fisher):
    model, optimizer = build(method, fisher)
    before = torch.get_rng_state()
    train(model, optimizer, STREAM)
    assert torch.equal(torch.get_rng_state(), before)


@every_method
def test_other_steps_draw_anew_and_the_same_step_draws_the_same(method, monkeypatch):
    drawn = draws_of(monkeypatch)
    runs = []
    for _ in range(2):
        drawn.clear()
        model, optimizer = build(method, schedule={"interval": (1, 4, 1), "warmup": STEPS})
        train(model, optimizer, STREAM)
        runs.append(list(drawn))
    assert runs[0] == runs[1]
    grids = {grids for grids, _ in runs[0] if grids != (None,)}
    assert len(grids) > 3
    examples = {chosen for _, chosen in runs[0] if chosen is not None}
    if "eigenvalues" in method.stages():
        assert len(examples) == STEPS * len(optimizer.layers)
        assert all(len(set(chosen)) == 5 for chosen in examples)
    else:
        assert not examples


@every_method
def test_all_three_options_do_something(method):
    ends = []
    for changed in (
        {},
        {"factor_rows": None},
        {"eigenvalue_examples": None},
        {"stagger": False},
    ):
        model, optimizer = build(method, **changed)
        train(model, optimizer, STREAM)
        ends.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
    different = [not torch.equal(end, ends[0]) for end in ends[1:]]
    assert different == [True, "eigenvalues" in method.stages(), True]


@every_fisher
@every_method
def test_a_resumed_run_goes_on_bit_for_bit_from_any_step(method, fisher):
    runs = (lambda model, seed=seed: build(method, fisher, model, seed)[1] for seed in (4, 5))
    assert_resumes_from_any_step(cnn, *runs, STREAM)


@pytest.mark.parametrize("steps", [0, 3, 5])
@every_way
@every_method
def test_a_copy_goes_on_bit_for_bit(method, duplicate, steps):
    model, optimizer = build(method)
    train(model, optimizer, STREAM[:steps])
    other, of_other = duplicate((model, optimizer))
    train(model, optimizer, STREAM[steps:])
    train(other, of_other, STREAM[steps:])
    assert_same_bits(everything(other, of_other), everything(model, optimizer))
    turns = [optimizer.schedule.turns[layer] for layer in optimizer.layers]
    assert [of_other.schedule.turns[layer] for layer in of_other.layers] == turns
    assert len(set(turns)) > 1


@every_method
def test_a_skipped_step_draws_nothing_from_the_steps_after_it(method):
    model, optimizer = build(method)
    train(model, optimizer, STREAM[:3])
    x, y = STREAM[0]
    momentary = copy.deepcopy(model.state_dict())
    with pytest.warns(RuntimeWarning, match="skipped"):
        train(model, optimizer, [(x * torch.nan, y)])
    model.load_state_dict(momentary)  # the batch norm has seen the NaN
    train(model, optimizer, STREAM[3:])
    undisturbed = build(method)
    train(*undisturbed, STREAM)
    assert_same_bits(everything(model, optimizer), everything(*undisturbed))
