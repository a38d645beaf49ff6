"""If this fails, some kind of layer trains on the factors of a layer it is not."""

from functools import cache, partial

import numpy as np
import pytest
import torch
from torch import nn

from tekfac_edu import optim, reference

from .networks import CASES, double_precision, one_layer
from .oracles import (
    assert_close,
    cross_entropy,
    factors_of_independence,
    fisher_block,
    layer_rows,
    objectives_empirical,
    per_example_gradients,
    second_moments,
    trace_restricted_numerators,
)

METHODS = ["KFAC", "EKFAC", "TKFAC", "TEKFAC"]
DAMPING = 0.03
EMPIRICAL = objectives_empirical(cross_entropy)
# a warning about a network that is all right is a fault too
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
every_method = pytest.mark.parametrize("method", METHODS)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def after_one_step(model, method, batch, **options):
    """The optimizer after one ordinary step with statistics of that batch alone."""
    settings = {"momentum": 0.0, "damping": DAMPING, "process_group": None}
    intervals = dict.fromkeys(["factor_interval", "eigen_interval", "scale_interval"], 1)
    optimizer = getattr(optim, method)(model, 0.01, **settings | intervals | options)
    cross_entropy(model, *batch).backward()
    optimizer.step()
    return optimizer


@cache
def oracle_rows(case):
    model, batch = case.make(), case.batch()
    return {
        name: layer_rows(model, model.get_submodule(name), EMPIRICAL, batch) for name in case.layers
    }


def random_matrix(a, g, seed=5):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(g.shape[-1], a.shape[-1], generator=draw, dtype=torch.float64)


@every_case
def test_the_rows_of_the_oracle_make_the_gradients_of_autograd(case):
    model, batch = case.make(), case.batch()
    for name, (a, g) in oracle_rows(case).items():
        G = per_example_gradients(model, model.get_submodule(name), EMPIRICAL, batch)
        for s, n in np.ndindex(*G.shape[:2]):
            summed = sum(np.outer(g[s, n, t], a[n, t]) for t in range(a.shape[1]))
            assert_close(summed, G[s, n], rtol=1e-12)


@every_case
@every_method
def test_one_step_gives_the_preconditioner_of_the_reference(case, method):
    model = case.make()
    optimizer = after_one_step(model, method, case.batch())
    for name, (a, g) in oracle_rows(case).items():
        M = random_matrix(a, g)
        expected = getattr(reference, method).fit(a, g).precondition(M.numpy(), DAMPING)
        assert_close(optimizer.precondition(model.get_submodule(name), M), expected)


def dense_inverse(optimizer, module, d_out, d_in):
    """The preconditioner as a matrix: column j·d_out + i is vec of it applied to the unit E_ij."""
    columns = []
    for j in range(d_in):
        for i in range(d_out):
            unit = torch.zeros(d_out, d_in, dtype=torch.float64)
            unit[i, j] = 1
            columns.append(optimizer.precondition(module, unit).numpy().flatten(order="F"))
    return np.stack(columns, axis=1)


def corrected_dense(G, S_in, S_out):
    """(Q_in ⊗ Q_out) diag(E[(Q_outᵀ G Q_in)²]) (Q_in ⊗ Q_out)ᵀ, bases from two factors."""
    Q_in, Q_out = np.linalg.eigh(S_in)[1], np.linalg.eigh(S_out)[1]
    Q = np.kron(Q_in, Q_out)
    return (Q * second_moments(G, Q_in, Q_out).flatten(order="F")) @ Q.T


@pytest.mark.parametrize("name", ["Linear", "Linear, used twice", "Conv2d, strided"])
@every_method
def test_the_preconditioner_is_the_inverse_of_the_matrix_in_the_papers(name, method):
    (case,) = [case for case in CASES if case.name == name]
    a, g = oracle_rows(case)["layer"]
    pristine, model = case.make(), case.make()
    G = per_example_gradients(pristine, pristine.layer, EMPIRICAL, case.batch())
    A, Gamma = factors_of_independence(a, g)
    delta, left, right = trace_restricted_numerators(a, g)
    expected = {
        "KFAC": lambda: np.kron(A, Gamma),
        "EKFAC": lambda: corrected_dense(G, A, Gamma),
        "TKFAC": lambda: np.kron(left, right) / delta,
        "TEKFAC": lambda: corrected_dense(G, left, right),
    }[method]()
    optimizer = after_one_step(model, method, case.batch(), damping_rule="added")
    inverse = dense_inverse(optimizer, model.layer, *G.shape[2:])
    assert_close(inverse @ (expected + DAMPING * np.eye(len(expected))), np.eye(len(expected)))
    if method in ("EKFAC", "TEKFAC"):
        assert_close(np.trace(expected), np.trace(fisher_block(G)), rtol=1e-12)
    if method == "TKFAC" and a.shape[1] == 1:
        assert_close(np.trace(expected), np.trace(fisher_block(G)), rtol=1e-12)


@pytest.mark.parametrize("trace_restricted", [("TKFAC", "KFAC"), ("TEKFAC", "EKFAC")])
def test_traces_are_taken_example_by_example_not_of_batch_means(trace_restricted):
    """With δ = tr A · tr G, Φ = A / tr A, Ψ = G / tr G the product is KFAC's, whatever its name."""
    restricted, of_independence = trace_restricted
    case = CASES[0]
    a, g = oracle_rows(case)["layer"]
    A, Gamma = factors_of_independence(a, g)
    delta, left, right = trace_restricted_numerators(a, g)
    product = np.trace(A) * np.trace(Gamma)
    assert abs(delta / product - 1) > 0.2, "this batch cannot tell the two apart"
    one, other = case.make(), case.make()
    inverses = [
        dense_inverse(
            after_one_step(*pair, case.batch(), damping_rule="added"), pair[0].layer, 5, 5
        )
        for pair in ((one, restricted), (other, of_independence))
    ]
    difference = np.linalg.norm(inverses[0] - inverses[1]) / np.linalg.norm(inverses[1])
    assert difference > 0.05
    factors = optim.trace_restricted_factors(torch.tensor(a), torch.tensor(g))
    assert_close(factors.delta, delta, rtol=1e-12)
    assert_close(factors.Phi, left / delta, rtol=1e-12)
    assert_close(factors.Psi, right / delta, rtol=1e-12)


def test_a_frozen_weight_stays_and_its_bias_takes_plain_steps():
    case = one_layer("frozen", (4,), nn.Linear, 4, 5, freeze=["weight"])
    model, pristine = case.make(), case.make()
    cross_entropy(pristine, *case.batch()).backward()
    optimizer = after_one_step(model, "TEKFAC", case.batch(), lr_other=0.25)
    assert torch.equal(model.layer.weight, pristine.layer.weight)
    plain = pristine.layer.bias - 0.25 * pristine.layer.bias.grad
    assert_close(model.layer.bias, plain.detach().numpy(), rtol=1e-14)
    with pytest.raises(ValueError, match=r"layer|Linear"):
        optimizer.precondition(model.layer, torch.zeros(5, 5, dtype=torch.float64))


def test_a_frozen_bias_stays():
    (case,) = [case for case in CASES if case.name == "Conv2d, frozen bias"]
    model = case.make()
    after_one_step(model, "TEKFAC", case.batch(), weight_decay=0.5)
    assert torch.equal(model.layer.bias, case.make().layer.bias)


@pytest.mark.parametrize("shape", [(4,), (2, 5, 4)], ids=["Linear", "Conv2d"])
@every_method
def test_an_input_without_batch_axis_is_one_example(shape, method):
    layer = (nn.Linear, 4, 3) if len(shape) == 1 else (nn.Conv2d, 2, 3, (5, 4))
    make = partial(double_precision, lambda: nn.Sequential(layer[0](*layer[1:]), nn.Flatten(0)))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    label = torch.tensor(1)
    model, batched = make(), make()
    batched[1] = nn.Flatten()
    a, g = layer_rows(batched, batched[0], EMPIRICAL, [x[None], label[None]])
    optimizer = after_one_step(model, method, [x, label])
    M = random_matrix(a, g)
    expected = getattr(reference, method).fit(a, g).precondition(M.numpy(), DAMPING)
    assert_close(optimizer.precondition(model[0], M), expected)


@pytest.mark.parametrize(
    "layer",
    [
        partial(nn.Conv2d, 4, 4, 3, groups=2),
        partial(nn.Conv1d, 4, 4, 3, groups=4),
        partial(nn.Conv3d, 1, 1, 2),
        partial(nn.ConvTranspose2d, 1, 1, 2),
    ],
    ids=["grouped", "depthwise", "Conv3d", "transposed"],
)
def test_what_cannot_be_factored_is_refused_by_name(layer):
    make = partial(
        double_precision, lambda: nn.ModuleDict({"trunk": nn.Linear(2, 2), "odd": layer()})
    )
    with pytest.raises(ValueError, match=r"odd.*plain_sgd=\['odd'\]"):
        optim.TEKFAC(make(), 0.1)
    optim.TEKFAC(make(), 0.1, plain_sgd=["odd"])


def test_calls_that_disagree_about_the_number_of_examples_are_refused():
    case = CASES[0]
    model, (x, y) = case.make(), case.batch()
    optimizer = optim.TEKFAC(model, 0.1, process_group=None)
    loss = cross_entropy(model, x, y) + cross_entropy(model, x[:4], y[:4])
    with pytest.raises(ValueError, match=r"\[7, 4\]|\[4, 7\]"):
        loss.backward()
        optimizer.step()
