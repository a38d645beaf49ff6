"""If this fails, the weights that training arrives at are not those the update rule asks for."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

from tekfac_edu import reference
from tekfac_edu.optim import EKFAC, TEKFAC, TKFAC, ByTrace, Cost, Paper

from .dense_training import DenseTraining, Settings, looped_rows
from .networks import CLASSES, batches, cnn, double_precision, mlp
from .oracles import (
    assert_close,
    cross_entropy,
    half_squared_error,
    layer_rows_of_batch,
    objectives_empirical,
    weight_matrix,
)
from .training import METHODS, every_method

# a warning about a network that is all right is a fault too
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def examples_alone(model):
    """Norms with fixed statistics: what an example sends back does not depend on the others."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def rows_of_batch(model, module, batch):
    """Norms in training mode update their running statistics: look at a copy."""
    names = {part: name for name, part in model.named_modules()}
    copy = deepcopy(model)
    return layer_rows_of_batch(copy, copy.get_submodule(names[module]), cross_entropy, batch)


NETWORKS = {
    "mlp": (mlp, (4,), looped_rows(objectives_empirical(cross_entropy))),
    "cnn": (
        lambda: examples_alone(cnn()),
        (1, 6, 6),
        looped_rows(objectives_empirical(cross_entropy)),
    ),
    "cnn, norms in training mode": (cnn, (1, 6, 6), rows_of_batch),
}
every_network = pytest.mark.parametrize("network", NETWORKS)


def compare(network, method, steps, settings):
    """Train one copy by the package and one by dense algebra; their changes must agree."""
    make, shape, rows = NETWORKS[network]
    start, ours, theirs = make(), make(), make()
    optimizer = method(ours, process_group=None, **settings.arguments())
    oracle = DenseTraining(theirs, method.__name__, settings, cross_entropy, rows)
    for batch in batches(shape, steps):
        optimizer.zero_grad()
        cross_entropy(ours, *batch).backward()
        optimizer.step()
        oracle.step(batch)
    for (name, before), one, other in zip(
        start.named_parameters(), ours.parameters(), theirs.parameters(), strict=True
    ):
        assert not torch.equal(one, before), f"{name} has not moved"
        assert_close((one - before), (other - before).detach().numpy())


@every_network
@every_method
def test_one_step(network, method):
    compare(network, method, 1, Settings())


@pytest.mark.parametrize("intervals", [(1, 1, 1), (2, 3, 1), (3, 1, 2)], ids=str)
@every_network
@every_method
def test_steps_with_momentum_decay_and_intervals(network, method, intervals):
    settings = Settings(lr=1.0, momentum=0.8, weight_decay=0.3, decay=0.7, interval=intervals)
    compare(network, method, 3 if intervals == (1, 1, 1) else 5, settings)


VARIANTS = {
    "steps of SGD's length": {"lr": 0.5},
    "averages that forget": {"decay": 0.4},
    "warm-up": {"warmup": 2, "interval": (3, 2, 4)},
    "damping added": {"rule": "Added"},
    "a trust region that acts": {"trust": 1e-4},
    "a trust region, by trace": {"trust": 1e-4, "rule": "ByTrace", "lr": 3.0},
    "by trace": {"rule": "ByTrace", "lr": 0.3},
    "by trace, multiplied": {"rule": "ByTrace", "multiplier": 3.0, "damping": 0.5, "lr": 0.3},
    "by trace, floor above every trace": {"rule": "ByTrace", "floor": 1e4, "lr": 0.1},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("network", ["mlp", "cnn"])
@every_method
def test_variants_of_the_update(network, method, variant):
    settings = {"momentum": 0.5, "weight_decay": 0.1, "interval": (1, 2, 1)}
    compare(network, method, 3, Settings(**settings | VARIANTS[variant]))


@pytest.mark.parametrize("method", [TKFAC, TEKFAC])
@every_network
def test_factors_of_summed_positions(network, method):
    compare(network, method, 3, Settings(interval=(1, 2, 1), positions="summed", lr=0.5))


def targets(loss, x, labels):
    """Labels, or for squared error some function of x."""
    return labels if loss == "cross_entropy" else torch.cat([x.sin(), x.cos()], 1)[:, :CLASSES]


def copied(weights, activation):
    """A torch network with the weights of a reference MLP."""
    layers = []
    for W in weights:
        layers += [nn.Linear(W.shape[1] - 1, len(W)), activation()]
    network = double_precision(lambda: nn.Sequential(*layers[:-1]))
    with torch.no_grad():
        for layer, W in zip(network[::2], weights, strict=True):
            layer.weight.copy_(torch.tensor(W[:, :-1]))
            layer.bias.copy_(torch.tensor(W[:, -1]))
    return network


@pytest.mark.parametrize("intervals", [(1, 1, 1), (2, 3, 1)], ids=str)
@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize(
    ("method", "basis"), [*[(method, "eigh") for method in METHODS], (EKFAC, "qr"), (TEKFAC, "qr")]
)
def test_five_steps_beside_the_reference(method, basis, loss, fisher, intervals):
    settings = {"lr": 0.5, "damping": 0.1, "momentum": 0.7, "fisher": fisher}
    settings |= {"interval": intervals, "decay": 0.6}
    theirs = reference.MLP((4, 5, CLASSES), "tanh", rng=0)
    start = [W.copy() for W in theirs.weights]
    ours = copied(theirs.weights, nn.Tanh)
    cost = Cost(eigenbasis=basis)
    optimizer = method(ours, process_group=None, warmup=0, cost=cost, **settings)
    settings |= {"loss": loss, "basis": basis, "lr_scale": "sgd"}
    twin = reference.NaturalGradient(theirs, method.__name__.lower(), **settings)
    criterion = cross_entropy if loss == "cross_entropy" else half_squared_error
    likelihood = "categorical" if loss == "cross_entropy" else "gaussian"
    for x, labels in batches((4,), 5):
        y = targets(loss, x, labels)
        outputs = []
        optimizer.zero_grad()
        value = criterion(lambda x, kept=outputs: kept.append(ours(x)) or kept[0], x, y)
        if fisher == "exact":
            optimizer.accumulate_fisher(outputs[0], likelihood=likelihood)
        value.backward()
        optimizer.step()
        twin.step(x.numpy(), y.numpy())
    for layer, before, after in zip(ours[::2], start, theirs.weights, strict=True):
        assert_close(weight_matrix(layer.weight, layer.bias) - before, after - before)


def test_a_network_without_convolutions_keeps_its_damping_under_the_rule_by_trace():
    one, other = mlp(), mlp()
    for model, rule in ((one, Paper(1e-2)), (other, ByTrace(1e-2))):
        optimizer = TEKFAC(model, 1e-3, damping=rule, process_group=None)
        for batch in batches((4,), 1):
            cross_entropy(model, *batch).backward()
            optimizer.step()
    for left, right in zip(one.parameters(), other.parameters(), strict=True):
        assert np.array_equal(left.detach().numpy(), right.detach().numpy())
