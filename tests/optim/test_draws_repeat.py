"""If this fails, a run with drawn statistics and turns is not the same run twice."""

import copy
import io
import pickle

import pytest
import torch

from tekfac_edu.optim.batch import LayerBatch

from .networks import batches, cnn
from .training import assert_same_bits, every_method, everything, train

STEPS = 8
STREAM = list(batches((1, 6, 6), STEPS))
DRAWN = {"factor_rows": 2, "scale_examples": 5, "stagger": True}
PERIODS = {"factor_interval": 2, "eigen_interval": 4, "scale_interval": 2}
every_fisher = pytest.mark.parametrize("fisher", ["empirical", "mc", "exact"])


def build(method, fisher="empirical", model=None, **changed):
    model = model or cnn()
    generator = torch.Generator().manual_seed(4) if fisher == "mc" else None
    settings = {"damping": 0.1, "fisher": fisher, "generator": generator, "warmup_steps": 2}
    return model, method(model, 0.05, **settings | PERIODS | DRAWN | changed)


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
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, optimizer = build(method, fisher)
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
        model, optimizer = build(method, warmup_steps=STEPS, scale_interval=1, factor_interval=1)
        train(model, optimizer, STREAM)
        runs.append(list(drawn))
    assert runs[0] == runs[1]
    grids = {grids for grids, _ in runs[0] if grids != (None,)}
    assert len(grids) > 3
    examples = {chosen for _, chosen in runs[0] if chosen is not None}
    if optimizer.corrected:
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
        {"scale_examples": None},
        {"stagger": False},
    ):
        model, optimizer = build(method, **changed)
        train(model, optimizer, STREAM)
        ends.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
    different = [not torch.equal(end, ends[0]) for end in ends[1:]]
    assert different == [True, optimizer.corrected, True]


def through_a_file(value, weights_only):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


@every_fisher
@every_method
def test_a_resumed_run_goes_on_bit_for_bit_from_any_step(method, fisher):
    model, optimizer = build(method, fisher)
    saved = []
    for batch in STREAM:
        saved.append(through_a_file(everything(model, optimizer), weights_only=True))
        train(model, optimizer, [batch])
    expected = everything(model, optimizer)
    for step, state in enumerate(saved):
        other = cnn()
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(-0.5)
        resumed, again = build(method, fisher, other)
        resumed.load_state_dict(state["model"])
        again.load_state_dict(state["optimizer"])
        train(resumed, again, STREAM[step:])
        assert_same_bits(everything(resumed, again), expected)


@pytest.mark.parametrize("steps", [0, 3, 5])
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), lambda x: through_a_file(x, False)],
    ids=["deepcopy", "pickle", "file"],
)
@every_method
def test_a_copy_goes_on_bit_for_bit(method, duplicate, steps):
    model, optimizer = build(method)
    train(model, optimizer, STREAM[:steps])
    other, of_other = duplicate((model, optimizer))
    train(model, optimizer, STREAM[steps:])
    train(other, of_other, STREAM[steps:])
    assert_same_bits(everything(other, of_other), everything(model, optimizer))
    turns = [optimizer.turns[layer] for layer in optimizer.layers]
    assert [of_other.turns[layer] for layer in of_other.layers] == turns
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


def test_the_settings_are_in_the_repr():
    _, optimizer = build(every_method.args[1][3])
    assert "factor_rows=2.0, scale_examples=5, stagger=True" in repr(optimizer)
