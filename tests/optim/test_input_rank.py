"""If this fails, a layer of many inputs is preconditioned by another matrix than `input_rank` says.

With Q_in completed by any further columns to a full basis, and D the eigenvalues in it:

    D[i, j]  for j < k,    r_i = mean of D[i, j] over the d_in − k other j

The oracle has full bases from NumPy, and the whole matrix; it shares the rest out at the end.
"""

import os
from dataclasses import asdict, dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from tekfac_edu import optim
from tekfac_edu.optim import EKFAC, TEKFAC

from . import two_processes
from .dense_training import (
    CORRECTED,
    INDEPENDENCE,
    DenseLayer,
    DenseTraining,
    Settings,
    looped_rows,
)
from .networks import CASES, batches, cnn, mlp, one_layer
from .oracles import (
    assert_close,
    cross_entropy,
    factors_of_independence,
    layer_rows,
    objectives_categorical,
    objectives_empirical,
    per_example_gradients,
    second_moments,
    trace_restricted_numerators,
    vec,
)
from .test_drawn_examples import combinations
from .training import (
    EVERY_STEP,
    UNEVEN,
    all_finite,
    assert_same_bits,
    backward,
    every_method,
    everything,
    parameters,
    train,
)

OBJECTIVES = {"empirical": objectives_empirical(cross_entropy), "exact": objectives_categorical}
METHODS = ["KFAC", "EKFAC", "TKFAC", "TEKFAC"]
# every basis that a method can have
METHODS_AND_BASES = [*((name, "eigh") for name in METHODS), ("EKFAC", "qr"), ("TEKFAC", "qr")]
# T = 1; positions, formed first and projected first; a layer used several times
NAMES = [
    "Linear",
    "Linear, no bias",
    "Linear, frozen bias",
    "Linear, positions",
    "Conv1d, plain",
    "Conv2d, plain",
    "Conv2d, no bias",
    "Conv2d, everything differs by axis",
    "Linear, used twice",
    "Linear, used on a sequence and on its mean",
    "Conv2d, used on two sizes of picture",
]
FEW_POSITIONS = [
    one_layer("Linear, two positions, five outputs", (2, 4), nn.Linear, 4, 5),
    one_layer("Conv2d, four positions, six outputs", (2, 4, 4), nn.Conv2d, 2, 6, 3),
]
CHOSEN = [case for name in NAMES for case in CASES if case.name == name] + FEW_POSITIONS
assert len(CHOSEN) == len(NAMES) + 2
every_case = pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.name)
every_fisher = pytest.mark.parametrize("fisher", OBJECTIVES)
every_name = pytest.mark.parametrize("name", METHODS)
every_basis = pytest.mark.parametrize(("name", "basis"), METHODS_AND_BASES)
RANKS = (1, 3)  # of 4 inputs at least: three to share, and one or more
# a warning about a network that is all right is a fault too
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


@cache
def oracle(case, fisher):
    """a, g and the per-example gradients of `layer`."""
    model, batch = case.make(), case.batch()
    which = model, model.layer, OBJECTIVES[fisher], batch
    return *layer_rows(*which), per_example_gradients(*which)


def after_one_step(case, name, fisher="empirical", parts=None, **options):
    """The optimizer, the module `layer` and its curvature."""
    model, (x, y) = case.make(), case.batch()
    settings = {"fisher": fisher, "process_group": None, "momentum": 0.0, **EVERY_STEP}
    optimizer = getattr(optim, name)(model, 0.01, **(settings | options))
    parts = parts or [slice(None)]
    for part in parts:
        outputs = model(x[part])
        if fisher != "empirical":
            optimizer.accumulate_fisher(outputs)
        (functional.cross_entropy(outputs, y[part]) / len(parts)).backward()
    optimizer.step()
    return optimizer, model.layer, curvatures_of(optimizer)["layer"]


def curvatures_of(optimizer):
    return {layer.name: optimizer.curvatures[layer] for layer in optimizer.layers}


def factors(name, a, g):
    """The input and output side's matrices, and what their Kronecker product is multiplied by."""
    if name in INDEPENDENCE:
        return *factors_of_independence(a, g), 1.0
    delta, left, right = trace_restricted_numerators(a, g)
    return left / delta, right / delta, delta


def completed(Q):
    """Columns that make an orthonormal set a basis, behind it."""
    return np.hstack([Q, np.linalg.qr(Q, mode="complete")[0][:, Q.shape[1] :]])


def gathered(D, k):
    """(d_out, d_in) -> (d_out, k + 1): the columns from k on are summed."""
    return np.hstack([D[:, :k], D[:, k:].sum(1, keepdims=True)])


def shared_out(D, k):
    """(d_out, d_in), the columns from k on replaced by their mean."""
    mean = D[:, k:].mean(1, keepdims=True)
    return np.hstack([D[:, :k], np.repeat(mean, D.shape[1] - k, 1)])


class TruncatedLayer(DenseLayer):
    """A layer whose smaller input eigenvalues are replaced by their mean, all but k of them."""

    def __init__(self, method, settings, k):
        super().__init__(method, settings)
        self.k = k

    def update(self, step, a, g):
        super().update(step, a, g)
        (Q_in, Q_out), (scale, left, right) = self.bases, self.held
        d_out, d_in = len(Q_out), len(Q_in)
        if d_in <= self.k:
            return
        Q_in = Q_in[:, ::-1]  # largest first
        s_in = np.diag(Q_in.T @ left @ Q_in)[None]
        self.held = (scale, (Q_in * shared_out(s_in, self.k)) @ Q_in.T, right)
        Q = np.kron(Q_in, Q_out)
        D = np.diag(Q.T @ self.scaled @ Q).reshape(d_out, d_in, order="F")
        self.scaled = (Q * vec(shared_out(D, self.k))) @ Q.T


@dataclass
class TruncatedTraining(DenseTraining):
    k: int = 1

    def __post_init__(self):
        super().__post_init__()
        self.layers = {
            module: TruncatedLayer(self.method, self.settings, self.k) for module in self.layers
        }


def truncated_layer(case, name, fisher, k, **settings):
    a, g, _ = oracle(case, fisher)
    layer = TruncatedLayer(name, Settings(**settings), k)
    layer.update(0, a, g)
    return layer


@every_case
@every_name
def test_the_basis_is_the_leading_eigenvectors_of_the_input_side(case, name):
    a, g, _ = oracle(case, "empirical")
    S_in, S_out, _ = factors(name, a, g)
    V_in, V_out = np.linalg.eigh(S_in)[1], np.linalg.eigh(S_out)[1]
    for k in RANKS:
        _, _, curvature = after_one_step(case, name, input_rank=k)
        Q_in, Q_out = curvature.Q_in.numpy(), curvature.Q_out.numpy()
        assert (Q_in.shape, Q_out.shape) == ((len(S_in), k), S_out.shape)
        assert_close(Q_in.T @ Q_in, np.eye(k))
        assert_close(abs(V_in[:, -k:].T @ Q_in).max(0), np.ones(k))
        assert_close(Q_out.T @ Q_out, np.eye(len(S_out)))
        if np.linalg.matrix_rank(S_out) >= len(S_out) - 1:
            assert_close(abs(V_out.T @ Q_out).max(0), np.ones(len(S_out)))


@every_case
@every_fisher
@every_basis
def test_eigenvalues_are_measured_in_the_basis_and_the_last_column_has_the_rest(
    case, fisher, name, basis
):
    a, g, G = oracle(case, fisher)
    S_in, S_out, scale = factors(name, a, g)
    options = {"fisher": fisher, "eigenbasis": basis}
    for k in RANKS:
        _, _, curvature = after_one_step(case, name, input_rank=k, **options)
        Q_in, Q_out = completed(curvature.Q_in.numpy()), curvature.Q_out.numpy()
        s_in, s_out = np.diag(Q_in.T @ S_in @ Q_in), np.diag(Q_out.T @ S_out @ Q_out)
        corrected = name in CORRECTED
        D = second_moments(G, Q_in, Q_out) if corrected else scale * np.outer(s_out, s_in)
        assert_close(curvature.eigenvalues, gathered(D, k))
        assert_close(curvature.spectrum, shared_out(D, k))
        trace = (G**2).sum() / G.shape[1] if corrected else scale * np.trace(S_in) * np.trace(S_out)
        assert_close(curvature.eigenvalues.sum(), trace)
        assert_close(curvature.spectrum.sum(), trace)
        if not corrected:
            assert_close(curvature.s_in, scale**0.5 * gathered(s_in[None], k)[0])
            assert_close(curvature.s_out, scale**0.5 * s_out)


@every_case
@every_fisher
@every_name
def test_the_preconditioner_is_that_of_the_whole_matrix_with_the_rest_shared(case, fisher, name):
    draw = np.random.default_rng(5)
    for k in RANKS:
        for rule in ("paper", "added"):
            options = {"fisher": fisher, "damping_rule": rule, "damping": 0.03}
            optimizer, module, _ = after_one_step(case, name, input_rank=k, **options)
            layer = truncated_layer(case, name, fisher, k, damping_rule=rule)
            d_in, d_out = (len(Q) for Q in layer.bases)
            M = draw.normal(size=(d_out, d_in)) * np.arange(1, d_in + 1)
            expected = np.linalg.solve(layer.damped(0.03), vec(M)).reshape(M.shape, order="F")
            assert_close(optimizer.precondition(module, torch.tensor(M)), expected)


NETWORKS = {"mlp": (mlp, (4,), 2), "mlp, one layer of two": (mlp, (4,), 5), "cnn": (cnn, None, 4)}
INTERVALS = [(1, 1, 1), (2, 3, 1), (3, 1, 2)]


def examples_alone(model):
    """Norms with fixed statistics: what an example sends back does not depend on the others."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def compare(network, name, steps, settings):
    """Train one copy by the package and one by dense algebra; their changes must agree."""
    make, shape, k = NETWORKS[network]
    start, ours, theirs = (examples_alone(make()) for _ in range(3))
    options = {"process_group": None, "input_rank": k}
    optimizer = getattr(optim, name)(ours, **asdict(settings), **options)
    rows = looped_rows(OBJECTIVES["empirical"])
    dense = TruncatedTraining(theirs, name, settings, cross_entropy, rows, k=k)
    for batch in batches(shape or (1, 6, 6), steps):
        backward(ours, optimizer, *batch)
        optimizer.step()
        dense.step(batch)
    for before, one, other in zip(*(m.parameters() for m in (start, ours, theirs)), strict=True):
        assert not torch.equal(one, before)
        assert_close(one - before, (other - before).detach().numpy())
    truncated = [layer for layer in optimizer.layers if layer.d_in > k]
    assert truncated
    for layer in truncated:
        assert optimizer.curvatures[layer].Q_in.shape == (layer.d_in, k)


@pytest.mark.parametrize("intervals", INTERVALS, ids=str)
@pytest.mark.parametrize("network", NETWORKS)
@every_name
def test_training_arrives_where_dense_algebra_does(network, name, intervals):
    """Five steps: bases turn under running averages, and D moves with them."""
    names = ("factor_interval", "eigen_interval", "scale_interval")
    settings = Settings(
        lr=0.05,
        momentum=0.8,
        weight_decay=0.3,
        factor_decay=0.7,
        scale_decay=0.4,
        **dict(zip(names, intervals, strict=True)),
    )
    compare(network, name, 5, settings)


VARIANTS = {
    "damping added": Settings(damping_rule="added"),
    "trace": Settings(damping_policy="trace", lr=0.01, lr_other=0.1),
    "trace, damping added, sgd scale": Settings(
        damping_policy="trace", damping_rule="added", lr_scale="sgd", lr=0.3
    ),
    "warm-up": Settings(warmup_steps=2, factor_interval=3, scale_interval=4),
}


@pytest.mark.parametrize("variant", VARIANTS)
@every_name
def test_variants_of_the_update(name, variant):
    settings = replace(VARIANTS[variant], momentum=0.5, weight_decay=0.1, eigen_interval=2)
    compare("cnn", name, 3, settings)


def run(method, make, shape, input_rank, steps=4, **options):
    model = make()
    settings = {"damping": 0.1, "input_rank": input_rank, **UNEVEN}
    optimizer = method(model, 0.05, **(settings | options))
    train(model, optimizer, batches(shape, steps))
    return model, optimizer


@pytest.mark.parametrize("input_rank", [9, 10**9])
@pytest.mark.parametrize("options", [{}, {"stagger": True, "fisher": "exact"}], ids=str)
@every_method
def test_layers_of_no_more_inputs_are_as_without_to_the_last_bit(method, options, input_rank):
    """The cnn's layers have 9, 9 and 4 inputs; the mlp's 5 and 6."""
    bases = [{}, {"eigenbasis": "qr"}] if method in (EKFAC, TEKFAC) else [{}]
    for basis in bases:
        for make, shape in ((cnn, (1, 6, 6)), (mlp, (4,))):
            found, expected = (
                everything(*run(method, make, shape, k, **basis, **options))
                for k in (input_rank, None)
            )
            assert_same_bits(found, expected)


@every_method
def test_only_the_layers_of_more_inputs_are_truncated(method):
    _, mixed = run(method, mlp, (4,), 5, steps=1)
    _, full = run(method, mlp, (4,), None, steps=1)
    states = [optimizer.state_dict()["curvatures"] for optimizer in (mixed, full)]
    assert_same_bits(states[0]["0"], states[1]["0"])
    assert [states[0][name]["Q_in"].shape for name in ("0", "2")] == [(5, 5), (6, 5)]
    for curvature in (curvatures_of(mixed)["0"], *curvatures_of(full).values()):
        assert torch.equal(curvature.spectrum, curvature.eigenvalues)


@pytest.mark.parametrize("case", [CHOSEN[0], CHOSEN[5], FEW_POSITIONS[1]], ids=lambda c: c.name)
@every_basis
def test_parts_of_a_batch_are_its_whole(case, name, basis):
    parts = [slice(0, 3), slice(3, 4), slice(4, 7)]
    with pytest.warns(RuntimeWarning, match="not the mean") if False else _nothing():
        whole, parted = (
            after_one_step(case, name, "exact", split, input_rank=3, eigenbasis=basis)
            for split in (None, parts)
        )
    for attribute in ("eigenvalues", "spectrum"):
        assert_close(getattr(parted[2], attribute), getattr(whole[2], attribute))
