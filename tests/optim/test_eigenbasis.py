"""If this fails, layers are preconditioned in another basis than their factors' eigenvectors."""

import numpy as np
import pytest
import torch

from tekfac_edu.optim.eigenbasis import DecompositionFailed, eigenbasis, precondition, qr_iteration

from .networks import gaussian, orthogonal
from .oracles import assert_close, vec


def factor(*shape, seed=0):
    """A positive definite matrix (..., d, d); eigenvalues apart by factors of 3 at least."""
    Q = orthogonal(*shape, seed=seed)
    return Q * 3.0 ** torch.arange(shape[-1]) @ Q.mT


def failing(eigh, fails):
    """eigh, but the calls for which fails(number of the call) raise as LAPACK does."""
    calls = []

    def maybe(S):
        calls.append(S.dtype)
        if fails(len(calls)):
            raise torch.linalg.LinAlgError("linalg.eigh: failed to converge")
        return eigh(S)

    maybe.calls = calls
    return maybe


def test_eigenbasis_diagonalizes_in_ascending_order():
    S = factor(5)
    eigenvalues, Q = eigenbasis(S)
    assert_close(eigenvalues, np.linalg.eigvalsh(S.numpy()), rtol=1e-13)
    assert_close(Q.T @ Q, np.eye(5), rtol=1e-13)
    assert_close(Q.T @ S @ Q, torch.diag(eigenvalues), rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_rounding_puts_below_zero_is_zero(dtype):
    row = gaussian(6).to(dtype)
    S = torch.outer(row, row) - 1e-7 * torch.eye(6, dtype=dtype)
    eigenvalues, Q = eigenbasis(S)
    assert eigenvalues.dtype == Q.dtype == dtype
    assert eigenvalues.min() == 0
    assert eigenvalues[-1] == pytest.approx(float(row @ row), rel=1e-5)


@pytest.mark.parametrize("shape", [(5,), (2, 5)], ids=["one", "blocks"])
def test_a_first_failure_is_tried_again_in_float64_and_its_ridge_taken_off(monkeypatch, shape):
    S = factor(*shape).float()
    expected, _ = eigenbasis(S)
    eigh = failing(torch.linalg.eigh, lambda call: call == 1)
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    eigenvalues, Q = eigenbasis(S)
    assert eigh.calls == [torch.float32, torch.float64]
    assert eigenvalues.dtype == Q.dtype == torch.float32
    assert torch.allclose(eigenvalues, expected, rtol=1e-4, atol=0)
    assert torch.allclose(Q * eigenvalues[..., None, :] @ Q.mT, S, rtol=0, atol=1e-4)


def test_the_ridge_is_off_to_the_last_digits_of_float64(monkeypatch):
    S = factor(5)
    expected, _ = eigenbasis(S)
    eigh = failing(torch.linalg.eigh, lambda call: call == 1)
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    assert_close(eigenbasis(S)[0], expected, rtol=1e-13)


def test_the_ridge_helps_a_matrix_without_rank(monkeypatch):
    """A second attempt on the very same matrix would fail again."""
    seen, eigh = [], torch.linalg.eigh

    def picky(S):
        seen.append(S)
        if np.linalg.matrix_rank(S.numpy()) < len(S):
            raise torch.linalg.LinAlgError("linalg.eigh: failed to converge")
        return eigh(S)

    monkeypatch.setattr(torch.linalg, "eigh", picky)
    row = gaussian(4)
    eigenvalues, _ = eigenbasis(torch.outer(row, row))
    assert len(seen) == 2
    assert_close(eigenvalues[-1], float(row @ row), rtol=1e-12)


@pytest.mark.parametrize("numbers", [torch.nan, torch.inf])
@pytest.mark.parametrize("blocks", [(), (2,)], ids=["one", "blocks"])
def test_what_is_not_finite_has_no_basis(numbers, blocks):
    for S in (factor(*blocks, 3), torch.eye(3, dtype=torch.float64).repeat(*blocks, 1, 1)):
        S[..., 0, 0] = numbers
        with pytest.raises(DecompositionFailed):
            eigenbasis(S)


def test_nan_that_lapack_hands_out_unsaid_is_a_failure_too(monkeypatch):
    def silent(S):
        return torch.linalg.eigvalsh(S), torch.full_like(S, torch.nan)

    monkeypatch.setattr(torch.linalg, "eigh", silent)
    with pytest.raises(DecompositionFailed, match="not finite"):
        eigenbasis(factor(3))


@pytest.mark.parametrize("k", [5, 3])
def test_a_qr_iteration_is_qr_of_S_times_Q_largest_direction_first(k):
    S, Q = factor(5), orthogonal(5, seed=1)[:, :k]
    order = np.argsort(-np.diag(Q.T @ S @ Q))
    expected, R = np.linalg.qr(S.numpy() @ Q.numpy()[:, order])
    found = qr_iteration(S, Q)
    assert_close(found, expected * np.sign(np.diag(R)), rtol=1e-13)
    assert_close(found.T @ found, np.eye(k), rtol=1e-13)


@pytest.mark.parametrize("k", [5, 3])
def test_qr_iterations_converge_to_the_leading_eigenvectors_and_stay(k):
    """Errors fall by the ratio of neighbouring eigenvalues, 3, each time."""
    S, Q = factor(5), orthogonal(5, seed=1)[:, :k]
    for _ in range(40):
        Q = qr_iteration(S, Q)
    leading = np.linalg.eigh(S.numpy())[1][:, ::-1][:, :k]
    assert_close(abs(leading.T @ Q.numpy()), np.eye(k), rtol=1e-12)
    assert_close(qr_iteration(S, Q), Q, rtol=1e-12)


def test_a_qr_iteration_of_a_singular_matrix_is_orthogonal_all_the_same():
    row = gaussian(4)
    Q = qr_iteration(torch.outer(row, row), torch.eye(4, dtype=torch.float64))
    assert_close(Q.T @ Q, np.eye(4), rtol=1e-13)


def problem(*blocks, d_out=3, d_in=4):
    M, D = gaussian(*blocks, d_out, d_in), gaussian(*blocks, d_out, d_in, seed=1).square() + 0.1
    return M, orthogonal(*blocks, d_in, seed=2), orthogonal(*blocks, d_out, seed=3), D


def test_precondition_solves_with_the_matrix_written_out():
    M, Q_in, Q_out, D = (t.numpy() for t in problem())
    Q = np.kron(Q_in, Q_out)
    expected = np.linalg.solve((Q * vec(D)) @ Q.T, vec(M)).reshape(M.shape, order="F")
    assert_close(precondition(*problem()), expected, rtol=1e-12)


def test_whatever_has_axes_in_front_is_worked_on_block_by_block():
    inputs = problem(2, 3)
    S = factor(2, 3, 4)
    found = precondition(*inputs), qr_iteration(S, inputs[1]), *eigenbasis(S)
    for block in np.ndindex(2, 3):
        one = precondition(*(t[block] for t in inputs))
        eigenvalues, Q = eigenbasis(S[block])
        expected = one, qr_iteration(S[block], inputs[1][block]), eigenvalues, Q
        for together, alone in zip(found, expected, strict=True):
            assert_close(together[block].abs(), alone.abs(), rtol=1e-12)
