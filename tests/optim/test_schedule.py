"""If this fails, layers that take turns are left out, refreshed twice, or all at once."""

from itertools import product
from math import ceil

import pytest
import torch
from torch import nn

from tekfac_edu.optim import EKFAC, TEKFAC, Cost
from tekfac_edu.optim.schedule import refresh_cost, shared_out, turns_of
from tekfac_edu.optim.treatment import find_layers

from .networks import CLASSES, batches, cnn, double_precision, mlp
from .training import (
    EVERY_STEP,
    UNEVEN,
    assert_same_bits,
    backward,
    every_method,
    everything,
    train,
)

CORRECTED = (EKFAC, TEKFAC)


def deep(layers):
    """So many dense layers of one shape; the last one's outputs are the logits."""
    return double_precision(lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers))))


def uneven():
    """Four layers, no two of one cost."""
    return double_precision(
        lambda: nn.Sequential(
            nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 6), nn.Linear(6, 5), nn.Linear(5, CLASSES)
        )
    )


def in_turns(*interval, stagger=True):
    """Settings: the interval of factors, bases and eigenvalues, and no warm-up."""
    return {"interval": interval, "warmup": 0, "cost": Cost(stagger=stagger)}


def refreshed(optimizer, stream, model):
    """For each step and layer the set of what was made anew: some of `ALL`."""
    history = []
    for x, y in stream:
        before = {layer: (c.factors, c.basis) for layer, c in optimizer.curvatures.items()}
        step = optimizer.steps
        backward(model, optimizer, x, y)
        optimizer.step()
        row = []
        for layer in optimizer.layers:
            c = optimizer.curvatures[layer]
            factors, basis = before[layer]
            anew = set()
            if c.factors is not factors:
                anew.add("factors")
            assert (c.basis is not basis) == (c.basis_step == step)
            anew |= {"basis"} if c.basis_step == step else set()
            anew |= {"eigenvalues"} if c.eigenvalues_step == step else set()
            row.append(anew)
        history.append(row)
    return history


ALL = {"factors", "basis", "eigenvalues"}


@pytest.mark.parametrize("fisher", ["empirical", "exact", "mc"])
@pytest.mark.parametrize(("make", "interval"), [(uneven, 4), (uneven, 3), (uneven, 7), (mlp, 2)])
@every_method
def test_every_layer_is_refreshed_once_in_every_interval_at_its_turn(
    method, make, interval, fisher
):
    model = make()
    optimizer = method(
        model,
        1e-3,
        damping=0.1,
        fisher=fisher,
        **in_turns(interval, interval, interval),
    )
    turns = [optimizer.schedule.turns[layer] for layer in optimizer.layers]
    assert all(0 <= turn < interval for turn in turns)
    history = refreshed(optimizer, batches((4,), 3 * interval + 2), model)
    assert history[0] == [ALL] * len(turns)
    for i, turn in enumerate(turns):
        for step, row in enumerate(history[1:], 1):
            assert row[i] == (ALL if step % interval == turn else set()), (step, turn)
        for start in range(1, 2 * interval + 2):
            window = history[start : start + interval]
            assert sum(bool(row[i]) for row in window) == 1


@pytest.mark.parametrize("warmup", [1, 3, 6])
@every_method
def test_all_are_refreshed_in_every_step_of_the_warm_up(method, warmup):
    model = uneven()
    settings = in_turns(4, 4, 4) | {"warmup": warmup}
    optimizer = method(model, 1e-3, damping=0.1, **settings)
    turns = [optimizer.schedule.turns[layer] for layer in optimizer.layers]
    history = refreshed(optimizer, batches((4,), warmup + 9), model)
    assert history[:warmup] == [[ALL] * 4] * warmup
    for step, row in enumerate(history[warmup:], warmup):
        assert row == [ALL if step % 4 == turn else set() for turn in turns]


@pytest.mark.parametrize("method", CORRECTED, ids=lambda method: method.__name__)
@pytest.mark.parametrize("make", [uneven, lambda: deep(11)], ids=["uneven", "eleven"])
@pytest.mark.parametrize("periods", [(2, 4, 8), (2, 8, 4), (4, 2, 8), (8, 4, 2), (1, 6, 3)])
def test_intervals_that_divide_each_other_stay_aligned(method, make, periods):
    """At the step of a layer's basis its factors are fresh, at the longest all three are."""
    model = make()
    optimizer = method(model, 1e-3, damping=0.1, **in_turns(*periods))
    longest = max(periods)
    history = refreshed(optimizer, batches((4,), 2 * longest + 3), model)
    for i, layer in enumerate(optimizer.layers):
        turn = optimizer.schedule.turns[layer]
        assert history[0][i] == ALL
        for step, row in enumerate(history[1:], 1):
            names = ("factors", "basis", "eigenvalues")
            due = {n for n, every in zip(names, periods, strict=True) if (step - turn) % every == 0}
            assert row[i] == due
            if (step - turn) % longest == 0:
                assert row[i] == ALL
            if "basis" in row[i] and periods[0] <= periods[1]:
                assert "factors" in row[i]


@every_method
def test_the_longest_interval_is_of_those_the_method_uses(method):
    """KFAC and TKFAC measure nothing: an interval of theirs must not stretch their turns."""
    optimizer = method(deep(6), 0.01, **in_turns(2, 3, 6))
    assert max(optimizer.schedule.turns.values()) == (5 if method in CORRECTED else 2)


@pytest.mark.parametrize("layers", [1, 2, 5, 10, 11, 23])
@pytest.mark.parametrize("interval", [1, 2, 3, 10])
def test_layers_of_one_cost_are_spread_evenly(layers, interval):
    found, _ = find_layers(deep(layers))
    turns = turns_of(found, interval)
    counts = [list(turns.values()).count(turn) for turn in range(interval)]
    assert list(turns) == found
    assert sum(counts) == layers
    assert max(counts) == ceil(layers / interval)
    if layers >= interval:
        assert min(counts) == layers // interval


def test_turns_of_no_layer_and_of_one():
    assert turns_of([], 7) == {}
    (layer,) = find_layers(deep(1))[0]
    assert turns_of([layer], 7) == {layer: 0}
    assert turns_of([layer], 1) == {layer: 0}


@pytest.mark.parametrize(("layers", "interval"), [(2, 10), (3, 10), (4, 10), (5, 10), (5, 7)])
def test_few_layers_are_as_far_apart_as_a_long_interval_allows(layers, interval):
    turns = sorted(turns_of(find_layers(deep(layers))[0], interval).values())
    gaps = [b - a for a, b in zip(turns, [*turns[1:], turns[0] + interval], strict=True)]
    assert min(gaps) == interval // layers
    assert max(gaps) == ceil(interval / layers)


@pytest.mark.parametrize("bins", [1, 2, 3, 7, 9])
@pytest.mark.parametrize("seed", range(2))
def test_the_dearest_step_is_within_graham_s_bound_of_the_best_sharing(seed, bins):
    """Dearest task first: at most 4/3 − 1/(3·bins) of the optimum (Graham 1969); all are tried."""
    draw = torch.Generator().manual_seed(seed)
    costs = (torch.rand(6, generator=draw) ** 3).tolist()

    def dearest(places):
        return max(
            sum(c for c, p in zip(costs, places, strict=True) if p == b) for b in set(places)
        )

    ours = shared_out(costs, bins)
    assert all(0 <= place < bins for place in ours)
    best = min(map(dearest, product(range(min(bins, 6)), repeat=6)))
    assert dearest(ours) <= (4 / 3 - 1 / (3 * bins)) * best * (1 + 1e-12)


def test_a_dear_layer_has_its_step_for_itself():
    model = double_precision(
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 60), nn.Linear(60, 4), nn.Linear(4, 4))
    )
    layers, _ = find_layers(model)
    turns = turns_of(layers, 3)
    assert refresh_cost(4, 60) > 10 * refresh_cost(5, 4)
    alone = [turns[layers[1]], turns[layers[2]]]
    assert len({*alone, turns[layers[0]]}) == 3
    assert turns[layers[0]] == turns[layers[3]]


@pytest.mark.parametrize("make", [mlp, cnn], ids=["mlp", "cnn"])
@every_method
def test_with_an_interval_of_one_nothing_changes(method, make):
    shape = (4,) if make is mlp else (1, 6, 6)

    def run(stagger):
        model = make()
        optimizer = method(model, 0.5, damping=0.1, **in_turns(1, 1, 1, stagger=stagger))
        train(model, optimizer, batches(shape, 4))
        state = everything(model, optimizer)
        assert state["optimizer"].pop("settings")["cost"]["stagger"] == stagger
        return state

    assert_same_bits(run(True), run(False))


@every_method
def test_without_turns_all_layers_are_due_together(method):
    optimizer = method(uneven(), 0.05, **UNEVEN)
    assert set(optimizer.schedule.turns.values()) == {0}


@every_method
def test_only_the_layers_that_are_due_are_captured(method):
    model = uneven()
    optimizer = method(model, 1e-3, damping=0.1, **in_turns(4, 2, 8))
    longest = 8 if method in CORRECTED else 4
    for step, (x, y) in enumerate(batches((4,), 2 * longest + 2)):
        due = {
            layer
            for layer in optimizer.layers
            if step == 0 or (step - optimizer.schedule.turns[layer]) % 4 == 0
        }
        assert optimizer.capture.wanted == due
        backward(model, optimizer, x, y)
        assert {use.layer for use in optimizer.capture.uses} == due
        optimizer.step()
        assert not optimizer.capture.uses


@every_method
def test_intervals_longer_than_the_run(method):
    """Every layer is refreshed at the first step, and those with a turn in the run once more."""
    model = uneven()
    optimizer = method(model, 1e-3, damping=0.1, **in_turns(1000, 1000, 1000))
    assert sorted(optimizer.schedule.turns.values()) == [0, 250, 500, 750]
    history = refreshed(optimizer, batches((4,), 6), model)
    assert history == [[ALL] * 4] + [[set()] * 4] * 5
    assert all(p.isfinite().all() for p in model.parameters())


@every_method
def test_a_layer_between_its_turns_is_preconditioned_by_what_it_has(method):
    """Its curvature is that of an ordinary optimizer which saw the same batches at its steps."""
    stream = list(batches((4,), 6))
    model = uneven()
    optimizer = method(model, 0.0, damping=0.1, **in_turns(3, 3, 3))
    train(model, optimizer, stream)
    for layer in optimizer.layers:
        turn = optimizer.schedule.turns[layer]
        other = uneven()
        alone = method(other, 0.0, damping=0.1, **EVERY_STEP)
        train(other, alone, [batch for s, batch in enumerate(stream) if s == 0 or s % 3 == turn])
        (same,) = [theirs for theirs in alone.layers if theirs.name == layer.name]
        ours, theirs = optimizer.curvatures[layer], alone.curvatures[same]
        for name in ("factors", "basis", "eigenvalues"):
            assert_same_bits(getattr(ours, name)._asdict(), getattr(theirs, name)._asdict())


class WithASpare(nn.Module):
    """A layer that is used in the first step and then no more."""

    def __init__(self):
        super().__init__()
        self.first, self.spare, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x, spare):
        x = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.spare(x)) if spare else x)


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@every_method
def test_a_step_may_leave_out_the_layer_whose_turn_it_is(method, fisher):
    model = double_precision(WithASpare)
    settings = in_turns(3, 3, 3)
    optimizer = method(model, 1e-3, damping=0.1, fisher=fisher, **settings)
    for step, (x, y) in enumerate(batches((4,), 7)):
        optimizer.zero_grad()
        outputs = model(x, spare=step == 0)
        if fisher != "empirical":
            optimizer.accumulate_fisher(outputs)
        nn.functional.cross_entropy(outputs, y).backward()
        optimizer.step()


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@every_method
def test_the_layer_whose_turn_it_is_may_have_been_frozen(method, fisher):
    model = mlp()
    settings = in_turns(2, 2, 2)
    optimizer = method(model, 1e-3, damping=0.1, fisher=fisher, **settings)
    stream = list(batches((4,), 6))
    train(model, optimizer, stream[:1])
    model[0].requires_grad_(False)
    train(model, optimizer, stream[1:])
