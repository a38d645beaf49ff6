"""If this fails, a matrix that LAPACK cannot decompose stops a run, or changes it unsaid."""

import warnings

import numpy as np
import pytest
import torch

from tekfac_edu.optim import Cost

from .networks import NETWORKS, batches, chosen, mlp, separable
from .one_step import (
    CORRECTED,
    after_one_step,
    corrected,
    curvatures_of,
    every_basis,
    factors,
    gradients,
    rows,
)
from .oracles import assert_close, by_group, second_moments
from .training import EVERY_STEP, all_finite, assert_same_bits, every_method, parameters, train
from .truncated_training import with_mean


@pytest.fixture(autouse=True)
def no_warning_passes_unseen():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def failing(eigh, fails):
    """eigh, but the calls for which fails(number of the call, matrix) raise as LAPACK does."""
    calls = []

    def maybe(S):
        calls.append(S)
        if fails(len(calls), S):
            raise torch.linalg.LinAlgError("linalg.eigh: failed to converge")
        return eigh(S)

    return maybe


def all_fail(monkeypatch):
    eigh, qr = torch.linalg.eigh, torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "eigh", failing(eigh, lambda *_: True))
    monkeypatch.setattr(torch.linalg, "qr", lambda S: tuple(torch.nan * part for part in qr(S)))


def bases_of(optimizer):
    curvatures = optimizer.state_dict()["curvatures"]
    return {name: dict(curvature["basis"]) for name, curvature in curvatures.items()}


def names_warned_of(caught):
    return sorted(str(warning.message).split(":")[0] for warning in caught)


@every_method
def test_an_eigendecomposition_that_fails_once_is_tried_again_in_float64(method, monkeypatch):
    stream = [(x.float(), y) for x, y in batches((4,), 1)]
    results, dtypes = [], []
    for fails in (lambda *_: False, lambda call, S: dtypes.append(S.dtype) or call == 1):
        model = mlp().float()
        optimizer = method(model, 1.0, damping=0.1, **EVERY_STEP)
        with monkeypatch.context() as patch:
            patch.setattr(torch.linalg, "eigh", failing(torch.linalg.eigh, fails))
            train(model, optimizer, stream)
        results.append(parameters(model))
    assert dtypes[:3] == [torch.float32, torch.float64, torch.float32]
    # The ridge is taken off again, so float32's rounding, through 1/damping, is all that differs.
    assert torch.allclose(*results, rtol=1e-4, atol=1e-6)


@every_method
def test_an_eigendecomposition_that_always_fails_keeps_the_basis_and_says_so_once(
    method, monkeypatch
):
    model = mlp()
    optimizer = method(model, 0.5, damping=0.1, **EVERY_STEP)
    stream = list(batches((4,), 8))
    train(model, optimizer, stream[:3])
    bases = bases_of(optimizer)
    shapes = [Q.shape for Q in bases["0"].values()]
    fails = failing(torch.linalg.eigh, lambda _, S: S.shape in shapes)
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    before = parameters(model)
    with pytest.warns(RuntimeWarning) as caught:
        train(model, optimizer, stream[3:])
    assert len(caught) == 1
    assert "0 (Linear)" in str(caught[0].message) and "eigendecomposition" in str(caught[0].message)
    after = bases_of(optimizer)
    assert_same_bits(after["0"], bases["0"])
    assert not torch.equal(after["2"]["Q_in"], bases["2"]["Q_in"])
    assert all_finite(model, optimizer)
    assert not torch.equal(parameters(model), before)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("input_rank", [None, 2])
@every_basis
def test_a_later_failure_keeps_the_basis_and_its_age(
    method, eigenbasis, input_rank, network, monkeypatch
):
    """The qr iteration fails by numbers that are not finite; nothing raises there."""
    make, shape = NETWORKS[network]
    model, cost = make(), Cost(eigenbasis=eigenbasis, input_rank=input_rank)
    optimizer = method(model, 0.5, damping=0.1, cost=cost, **EVERY_STEP)
    stream = list(batches(shape, 5))
    train(model, optimizer, stream[:2])
    before = bases_of(optimizer)
    all_fail(monkeypatch)
    with pytest.warns(RuntimeWarning, match="keeps its last basis") as caught:
        train(model, optimizer, stream[2:])
    assert names_warned_of(caught) == sorted(map(str, optimizer.layers))
    assert_same_bits(bases_of(optimizer), before)
    assert {row.basis_age for row in optimizer.report().rows if row.damping} == {3}
    assert all_finite(model, optimizer)


@every_method
def test_one_block_that_fails_keeps_the_bases_of_all_of_its_layer(method, monkeypatch):
    """They are decomposed at once."""
    model = separable()
    optimizer = method(model, 0.5, damping=0.1, **EVERY_STEP)
    stream = list(batches((4, 5, 5), 3))
    train(model, optimizer, stream[:2])
    before, eigh = bases_of(optimizer), torch.linalg.eigh

    def of_one_block(S):
        eigenvalues, Q = eigh(S)
        if S.ndim == 3 and len(S) == 2:
            Q[1] = torch.nan
        return eigenvalues, Q

    monkeypatch.setattr(torch.linalg, "eigh", of_one_block)
    with pytest.warns(RuntimeWarning) as caught:
        train(model, optimizer, stream[2:])
    assert names_warned_of(caught) == ["0 (Conv2d)"]
    after = bases_of(optimizer)
    assert_same_bits(after["0"], before["0"])
    assert not torch.equal(after["2"]["Q_in"], before["2"]["Q_in"])
    assert all_finite(model, optimizer)


@pytest.mark.parametrize("input_rank", [None, 1, 3])
@pytest.mark.parametrize(
    "case", chosen("Linear", "Conv2d, plain", "Conv2d, two groups"), ids=lambda case: case.name
)
@every_method
def test_without_any_basis_it_goes_on_in_coordinates_of_the_layer(
    method, case, input_rank, monkeypatch
):
    """Columns of the identity: D is then a diagonal of the factors or of the Fisher block."""
    all_fail(monkeypatch)
    with pytest.warns(RuntimeWarning) as caught:
        options = {"damping": 0.1, "cost": Cost(input_rank=input_rank)}
        optimizer, module, curvature = after_one_step(case, method, **options)
    assert names_warned_of(caught) == sorted(map(str, optimizer.layers))
    (a, g), G = rows(case), gradients(case)
    *_, d_out, d_in = G.shape
    k = input_rank or d_in

    def diagonal(a, g, G):
        S_in, S_out, scale = factors(method, a, g)
        D = scale * np.outer(np.diag(S_out), np.diag(S_in))
        D = second_moments(G, np.eye(d_in), np.eye(d_out)) if method in CORRECTED else D
        return with_mean(np.roll(D, k, 1), k)  # the last k coordinates are kept

    one = curvature.basis
    for Q, columns in ((one.Q_in, slice(d_in - k, None)), (one.Q_out, slice(None))):
        identity = torch.eye(Q.shape[-2], dtype=torch.float64)[:, columns]
        assert torch.equal(Q, identity.expand(Q.shape))
    assert_close(curvature.eigenvalues.D, by_group(module, diagonal, a, g, G))
    assert optimizer.precondition(module, torch.ones(curvature.layer.shape)).isfinite().all()


@pytest.mark.parametrize("input_rank", [None, 2])
@corrected
def test_the_same_where_a_first_qr_iteration_fails(method, input_rank, monkeypatch):
    (case,) = chosen("Linear")
    all_fail(monkeypatch)
    with pytest.warns(RuntimeWarning):
        cost = Cost(input_rank=input_rank, eigenbasis="qr")
        _, _, curvature = after_one_step(case, method, cost=cost)
    identity = torch.eye(5, dtype=torch.float64)
    assert torch.equal(curvature.basis.Q_in, identity[:, -(input_rank or 5) :])
    assert curvature.eigenvalues.D.isfinite().all()


@every_method
def test_a_run_that_began_without_a_basis_takes_the_first_that_can_be_had(method, monkeypatch):
    model = mlp()
    optimizer = method(model, 0.5, damping=0.1, **EVERY_STEP)
    stream = list(batches((4,), 3))
    with monkeypatch.context() as patch, pytest.warns(RuntimeWarning):
        all_fail(patch)
        train(model, optimizer, stream[:2])
    train(model, optimizer, stream[2:])
    for curvature in curvatures_of(optimizer).values():
        Q, S = curvature.basis.Q_in, curvature.factors.S_in
        turned = (Q.T @ S @ Q).numpy()
        assert_close(turned, np.diag(np.diag(turned)))
    assert all_finite(model, optimizer)
