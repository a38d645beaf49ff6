"""If this fails, a matrix that LAPACK cannot decompose stops a run, or changes it unsaid."""

import warnings

import pytest
import torch

from tekfac_edu.optim import TEKFAC, eigenbasis

from .networks import batches, mlp
from .training import EVERY_STEP, all_finite, assert_same_bits, every_method, parameters, train


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


def bases_of(optimizer):
    curvatures = optimizer.state_dict()["curvatures"]
    return {name: [c["Q_in"], c["Q_out"]] for name, c in curvatures.items()}


@every_method
def test_an_eigendecomposition_that_fails_once_is_tried_again_in_float64(method, monkeypatch):
    stream = [(x.float(), y) for x, y in batches((4,), 1)]
    results, dtypes = [], []
    for fails in (lambda *_: False, lambda call, S: dtypes.append(S.dtype) or call == 1):
        model = mlp().float()
        optimizer = method(model, 0.1, damping=0.1, **EVERY_STEP)
        with monkeypatch.context() as patch:
            patch.setattr(torch.linalg, "eigh", failing(torch.linalg.eigh, fails))
            train(model, optimizer, stream)
        results.append(parameters(model))
    assert dtypes[:3] == [torch.float32, torch.float64, torch.float32]
    # The ridge is taken off again, so float32's rounding, through 1/damping, is all that differs.
    assert torch.allclose(*results, rtol=1e-4, atol=1e-6)


def test_the_ridge_of_the_second_attempt_is_taken_off_again(monkeypatch):
    X = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    S = X.T @ X
    expected, _ = eigenbasis(S)
    monkeypatch.setattr(torch.linalg, "eigh", failing(torch.linalg.eigh, lambda n, _: n == 1))
    eigenvalues, Q = eigenbasis(S)
    assert torch.allclose(eigenvalues, expected, rtol=1e-12, atol=0)
    assert torch.allclose(Q * eigenvalues @ Q.T, S, rtol=0, atol=1e-12)


@every_method
def test_an_eigendecomposition_that_always_fails_keeps_the_basis_and_says_so_once(
    method, monkeypatch
):
    model = mlp()
    optimizer = method(model, 0.05, damping=0.1, **EVERY_STEP)
    stream = list(batches((4,), 8))
    train(model, optimizer, stream[:3])
    bases = bases_of(optimizer)
    shapes = [Q.shape for Q in bases["0"]]
    fails = failing(torch.linalg.eigh, lambda _, S: S.shape in shapes)
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    before = parameters(model)
    with pytest.warns(RuntimeWarning) as caught:
        train(model, optimizer, stream[3:])
    assert len(caught) == 1
    assert "0 (Linear)" in str(caught[0].message) and "eigendecomposition" in str(caught[0].message)
    after = bases_of(optimizer)
    assert_same_bits(after["0"], bases["0"])
    assert not torch.equal(after["2"][0], bases["2"][0])
    assert all_finite(model, optimizer)
    assert not torch.equal(parameters(model), before)


@every_method
def test_without_any_basis_it_goes_on_in_the_coordinates_of_the_layer(method, monkeypatch):
    """The identity as basis: D is then a diagonal of the factors or of the Fisher block itself."""
    monkeypatch.setattr(torch.linalg, "eigh", failing(torch.linalg.eigh, lambda *_: True))
    model = mlp()
    optimizer = method(model, 0.05, damping=0.1, **EVERY_STEP)
    with pytest.warns(RuntimeWarning) as caught:
        train(model, optimizer, batches((4,), 4))
    assert sorted(str(w.message).split(":")[0] for w in caught) == ["0 (Linear)", "2 (Linear)"]
    for curvature in optimizer.state_dict()["curvatures"].values():
        d_out, d_in = curvature["eigenvalues"].shape
        assert torch.equal(curvature["Q_in"], torch.eye(d_in, dtype=torch.float64))
        assert torch.equal(curvature["Q_out"], torch.eye(d_out, dtype=torch.float64))
        assert (curvature["eigenvalues"] > 0).all()
    assert all_finite(model, optimizer)


@every_method
def test_a_basis_that_could_not_be_refreshed_is_not_reported_as_young(method, monkeypatch):
    model = mlp()
    optimizer = method(model, 0.05, damping=0.1, **EVERY_STEP)
    train(model, optimizer, batches((4,), 2))
    monkeypatch.setattr(torch.linalg, "eigh", failing(torch.linalg.eigh, lambda *_: True))
    with pytest.warns(RuntimeWarning):
        train(model, optimizer, batches((4,), 3))
    assert [row.basis_age for row in optimizer.report().rows] == [3, 3]


def test_a_failing_qr_iteration_keeps_the_basis(monkeypatch):
    model = mlp()
    optimizer = TEKFAC(model, 0.05, damping=0.1, eigenbasis="qr", **EVERY_STEP)
    train(model, optimizer, batches((4,), 2))
    before = bases_of(optimizer)
    qr = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda S: tuple(torch.nan * part for part in qr(S)))
    with pytest.warns(RuntimeWarning) as caught:
        train(model, optimizer, batches((4,), 1))
    assert sorted(str(w.message).split(":")[0] for w in caught) == ["0 (Linear)", "2 (Linear)"]
    assert_same_bits(bases_of(optimizer), before)
    assert all_finite(model, optimizer)
