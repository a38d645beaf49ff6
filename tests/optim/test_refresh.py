"""If this fails, a refresh averages in something else than the means over a step's examples."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from tekfac_edu.optim import TEKFAC
from tekfac_edu.optim import batch as layer_batch
from tekfac_edu.optim.layers.convolution import Convolution, GroupedConvolution
from tekfac_edu.optim.layers.linear import Linear
from tekfac_edu.optim.refresh import added

from .networks import CLASSES, NETWORKS, batches, double_precision, mlp
from .one_step import CORRECTED
from .training import (
    EVERY_STEP,
    all_finite,
    assert_same_bits,
    backward,
    every_method,
    everything,
    train,
)


@pytest.fixture
def calls(monkeypatch):
    """A list of the names of layers whose `inputs` is called."""
    names = []

    def watched(inputs):
        def watching(layer, x, grid=None):
            names.append(layer.name)
            return inputs(layer, x, grid)

        return watching

    for kind in (Linear, Convolution, GroupedConvolution):
        monkeypatch.setattr(kind, "inputs", watched(vars(kind)["inputs"]))
    return names


# Those of convolutions in groups whose gradients are formed (S · d_out positions or more).
TWICE = {("groups", "empirical"): ["0", "2"], ("groups", "exact"): ["0"]}


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("network", NETWORKS)
@every_method
def test_a_layer_s_inputs_are_made_once_a_refresh(method, network, fisher, calls):
    """For factors, eigenvalues and the check of a first gradient together."""
    make, shape = NETWORKS[network]
    model = make()
    optimizer = method(model, 0.5, fisher=fisher, interval=2, warmup=0)
    names = [layer.name for layer in optimizer.layers]
    if method in CORRECTED:
        names += TWICE.get((network, fisher), [])
    for step, batch in enumerate(batches(shape, 4)):
        del calls[:]
        train(model, optimizer, [batch])
        assert sorted(calls) == ([] if step % 2 else sorted(names))


def test_inputs_that_take_much_room_are_made_for_each_statistic(calls, monkeypatch):
    monkeypatch.setattr(layer_batch, "KEPT", 0)
    model = mlp()
    optimizer = TEKFAC(model, 0.5, fisher="exact", **EVERY_STEP)
    train(model, optimizer, batches((4,), 1))
    assert sorted(calls) == ["0", "0", "2", "2"]


@every_method
def test_what_is_kept_for_the_second_statistic_changes_no_bit(method, monkeypatch):
    states = []
    for kept in (layer_batch.KEPT, 0):
        monkeypatch.setattr(layer_batch, "KEPT", kept)
        model = mlp()
        optimizer = method(model, 0.5, damping=0.1, **EVERY_STEP)
        train(model, optimizer, batches((4,), 3))
        states.append(everything(model, optimizer))
    assert_same_bits(*states)


def test_sums_over_chunks_count_each_by_its_weight():
    first, other = (torch.ones(2), torch.ones(1)), (torch.full((2,), 10.0), torch.zeros(1))
    total = added(added(None, first, 3), other, 0.5)
    assert [t.tolist() for t in total] == [[8.0, 8.0], [3.0]]


@every_method
def test_a_statistic_that_is_not_finite_is_left_out_and_its_layer_named_once(method):
    """The layer keeps what it has; the other one goes on learning."""
    model = mlp().float()
    optimizer = method(model, 1e-40, damping=0.1, **EVERY_STEP)
    stream = [(x.float(), y) for x, y in batches((4,), 4)]
    train(model, optimizer, stream[:2])
    before = optimizer.state_dict()["curvatures"]
    kept, other = (dict(before[name]["factors"]) for name in ("0", "2"))
    huge = [(x * 1e30, y) for x, y in stream[2:]]  # tanh makes ordinary inputs of it
    with pytest.warns(RuntimeWarning) as caught:
        for x, y in huge:
            backward(model, optimizer, x, y)
            for p in model[0].parameters():
                p.grad.zero_()
            optimizer.step()
    assert [str(w.message).split(":")[0] for w in caught] == ["0 (Linear)"]
    after = optimizer.state_dict()["curvatures"]
    assert_same_bits(dict(after["0"]["factors"]), kept)
    assert not torch.equal(next(iter(after["2"]["factors"].values())), next(iter(other.values())))
    assert all_finite(model, optimizer)


@every_method
def test_a_layer_that_was_not_used_keeps_what_it_has(method):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.other = nn.Linear(4, CLASSES), nn.Linear(4, CLASSES)

        def forward(self, x, which=("first", "other")):
            return sum(getattr(self, name)(x) for name in which)

    model = double_precision(Two)
    optimizer = method(model, 0.5, damping=0.1, **EVERY_STEP)
    stream = list(batches((4,), 2))
    train(model, optimizer, stream[:1])
    kept = optimizer.curvatures[optimizer.layers[1]].factors
    optimizer.zero_grad()
    functional.cross_entropy(model(stream[1][0], ["first"]), stream[1][1]).backward()
    optimizer.step()
    assert optimizer.curvatures[optimizer.layers[1]].factors is kept
    assert optimizer.curvatures[optimizer.layers[0]].factors is not kept
