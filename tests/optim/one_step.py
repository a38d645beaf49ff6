"""One step of one of `networks.CASES` and what the oracle knows of it; a few of a larger one."""

from functools import cache

import pytest
import torch
from torch.nn import functional

from tekfac_edu.optim import EKFAC, TEKFAC
from tekfac_edu.optim.capture import Capture
from tekfac_edu.optim.treatment import find_layers

from .networks import NETWORKS, batches
from .oracles import (
    cross_entropy,
    factors_of_independence,
    layer_rows,
    objectives_categorical,
    objectives_empirical,
    per_example_gradients,
    trace_restricted_numerators,
)
from .training import EVERY_STEP, METHODS, UNEVEN, everything, train

OBJECTIVES = {"empirical": objectives_empirical(cross_entropy), "exact": objectives_categorical}
CORRECTED = [EKFAC, TEKFAC]
corrected = pytest.mark.parametrize("method", CORRECTED, ids=lambda method: method.__name__)
every_basis = pytest.mark.parametrize(  # that a method can have
    ("method", "eigenbasis"),
    [*((method, "eigh") for method in METHODS), *((method, "qr") for method in CORRECTED)],
    ids=lambda value: getattr(value, "__name__", value),
)
N = 7


@cache
def rows(case, fisher="empirical", N=N, name="layer"):
    """a and g of a layer, every example through the model by itself."""
    model = case.make()
    return layer_rows(model, model.get_submodule(name), OBJECTIVES[fisher], case.batch(N))


@cache
def gradients(case, fisher="empirical", N=N):
    """(S, N, d_out, d_in) of `layer`, from autograd alone."""
    model = case.make()
    return per_example_gradients(model, model.layer, OBJECTIVES[fisher], case.batch(N))


def factors(method, a, g):
    """S_in, S_out and scale of one group's: F ≈ scale · S_in ⊗ S_out."""
    if method.__name__ in ("KFAC", "EKFAC"):
        return *factors_of_independence(a, g), 1.0
    delta, left, right = trace_restricted_numerators(a, g)
    return left / delta, right / delta, delta


def after_one_step(case, method, fisher="empirical", N=N, parts=None, **options):
    """The optimizer, the module `layer` and its curvature."""
    model, (x, y) = case.make(), case.batch(N)
    settings = {"momentum": 0.0, "process_group": None, "fisher": fisher, **EVERY_STEP}
    optimizer = method(model, 1.0, **(settings | options))
    parts = parts or [slice(None)]
    for part in parts:
        outputs = model(x[part])
        if fisher != "empirical":
            optimizer.accumulate_fisher(outputs)
        (functional.cross_entropy(outputs, y[part]) / len(parts)).backward()
    optimizer.step()
    return optimizer, model.layer, curvatures_of(optimizer)["layer"]


def curvatures_of(optimizer):
    """By the layers' names."""
    return {layer.name: curvature for layer, curvature in optimizer.curvatures.items()}


def captured(case, fisher="empirical", N=N, parts=(slice(None),)):
    """The `LayerBatch` of `layer` after one backward pass for each part, or for each vector."""
    model, (x, y) = case.make(), case.batch(N)
    layer = {layer.name: layer for layer in find_layers(model)[0]}["layer"]
    capture = Capture([layer], fisher == "empirical")
    if fisher == "empirical":
        for part in parts:
            (cross_entropy(model, x[part], y[part]) / len(parts)).backward()
    else:
        log_p = torch.log_softmax(model(x), 1)
        with capture.fisher_pass():
            for vector in (-log_p * log_p.detach().exp().sqrt()).T:
                vector.sum().backward(retain_graph=True)
    return capture.batches()[layer]


def run(method, network, steps=4, **options):
    """Model and optimizer after some steps of one of `NETWORKS`."""
    make, shape = NETWORKS[network]
    model = make()
    settings = {"damping": 0.1, "process_group": None, **UNEVEN}
    optimizer = method(model, 0.5, **(settings | options))
    train(model, optimizer, batches(shape, steps))
    return model, optimizer


def numbers(model, optimizer):
    """`everything` but the settings."""
    state = everything(model, optimizer)
    del state["optimizer"]["settings"]
    return state
