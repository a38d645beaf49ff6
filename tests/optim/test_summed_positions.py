"""If this fails, factors of summed positions are not the partial traces of the Fisher block."""

import numpy as np
import pytest
import torch

from tekfac_edu.optim import EKFAC, KFAC, TEKFAC, TKFAC, Cost
from tekfac_edu.optim.factors import factors_of_gradients, summed_factors

from .networks import batches, cnn, gaussian, mlp
from .oracles import assert_close, summed_numerators
from .training import EVERY_STEP, assert_same_bits, everything, train

SUMMED = {"positions": "summed", **EVERY_STEP}


@pytest.mark.parametrize("S", [1, 3])
@pytest.mark.parametrize("T", [1, 2, 9])
def test_both_ways_give_the_partial_traces(S, T):
    a, g = gaussian(5, T, 4), gaussian(S, 5, T, 3, seed=1)
    G = torch.einsum("snto,nti->snoi", g, a)
    for found in (summed_factors(a, g), factors_of_gradients(G)):
        for ours, theirs in zip(found, summed_numerators(a.numpy(), g.numpy()), strict=True):
            assert_close(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("method", [TKFAC, TEKFAC])
def test_of_a_convolution_the_factors_trace_is_that_of_the_eigenvalues(method, fisher):
    """TKFAC's trace, too, is the true one then."""
    model = cnn()
    optimizer = method(model, 0.1, fisher=fisher, **SUMMED)
    train(model, optimizer, batches((1, 6, 6), 1))
    true = TEKFAC(twin := cnn(), 0.1, fisher=fisher, **EVERY_STEP)
    train(twin, true, batches((1, 6, 6), 1))
    for layer, other in zip(optimizer.layers, true.layers, strict=True):
        curvature = optimizer.curvatures[layer]
        trace = true.curvatures[other].trace.numpy()
        assert_close(curvature.factors.delta, trace, rtol=1e-12)
        assert_close(curvature.trace, trace, rtol=1e-12)


@pytest.mark.parametrize("method", [TKFAC, TEKFAC])
def test_without_positions_nothing_changes(method):
    ends = []
    for positions in ("apart", "summed"):
        model = mlp()
        optimizer = method(model, 0.5, positions=positions, **EVERY_STEP)
        train(model, optimizer, batches((4,), 3))
        ends.append(model.state_dict())
    assert_same_bits(*ends)


def test_factors_and_eigenvalues_are_of_the_same_drawn_examples():
    """The trace says so: of other examples it would be another."""
    model = cnn()
    optimizer = TEKFAC(model, 0.1, cost=Cost(eigenvalue_examples=3), **SUMMED)
    train(model, optimizer, batches((1, 6, 6), 1))
    for layer in optimizer.layers:
        if layer.is_convolution:
            curvature = optimizer.curvatures[layer]
            assert_close(curvature.factors.delta, curvature.trace.numpy(), rtol=1e-12)


def test_of_a_convolution_each_example_s_gradient_is_formed_once(monkeypatch):
    model, formed = cnn(), []
    optimizer = TEKFAC(model, 0.1, **SUMMED)
    for layer in optimizer.layers:
        ordinary = layer.example_gradients

        def counted(x, g, name=layer.name, ordinary=ordinary):
            formed.append(name)
            return ordinary(x, g)

        monkeypatch.setattr(layer, "example_gradients", counted)
    train(model, optimizer, batches((1, 6, 6), 1))
    assert formed == ["0", "3"]  # the dense layer has one position: nothing is formed


@pytest.mark.parametrize("network, shape", [(cnn, (1, 6, 6)), (mlp, (4,))])
def test_a_batch_in_parts_gives_the_same(network, shape):
    ends = []
    for parts in (1, 3):
        model = network()
        model.eval()
        for module in model.modules():
            module.training = not isinstance(module, torch.nn.BatchNorm2d)
        optimizer = TEKFAC(model, 0.5, **SUMMED)
        for x, y in batches(shape, 2):
            optimizer.zero_grad()
            for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (torch.nn.functional.cross_entropy(model(xs), ys) / parts).backward()
            optimizer.step()
        ends.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
    assert_close(ends[1], ends[0].numpy(), rtol=1e-9)


@pytest.mark.parametrize("method", [KFAC, EKFAC])
def test_factors_of_independence_have_their_positions_apart(method):
    with pytest.raises(ValueError, match="positions must be one of 'apart'"):
        method(mlp(), 0.1, positions="summed")


def test_the_two_ways_of_counting_positions_differ():
    ends = []
    for positions in ("apart", "summed"):
        model = cnn()
        optimizer = TKFAC(model, 0.5, positions=positions, **EVERY_STEP)
        train(model, optimizer, batches((1, 6, 6), 1))
        ends.append(everything(model, optimizer)["model"]["0.weight"].numpy())
    assert np.abs(ends[0] - ends[1]).max() > 1e-6
