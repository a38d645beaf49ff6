"""If this fails, gradients are turned into a basis that is not orthogonal, or no eigenbasis."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tekfac_edu.reference import eigenbasis, precondition, qr_iteration

from .oracles import (
    assert_close,
    random_orthogonal,
    random_semidefinite,
    solve_dense,
    vec_by_loops,
)

sizes = st.integers(1, 6)
seeds = st.integers(0, 2**16)
scales = st.sampled_from([1.0, 1e-60, 1e24])


@given(sizes, seeds, scales)
def test_eigenbasis_diagonalizes(d, seed, scale):
    S = scale * random_semidefinite(np.random.default_rng(seed), d)
    eigenvalues, Q = eigenbasis(S)
    assert_close(Q.T @ Q, np.eye(d), rtol=1e-13)
    assert_close(Q * eigenvalues @ Q.T, S, rtol=1e-12)
    assert (np.diff(eigenvalues) >= 0).all()


@given(st.integers(2, 6), seeds, scales)
def test_a_singular_matrix_has_eigenvalues_that_are_not_negative_beyond_rounding(d, seed, scale):
    S = scale * random_semidefinite(np.random.default_rng(seed), d, rank=1)
    eigenvalues, Q = eigenbasis(S)
    assert (eigenvalues >= -1e-14 * np.trace(S)).all()
    assert_close(Q.T @ Q, np.eye(d), rtol=1e-13)
    assert_close(Q * eigenvalues @ Q.T, S, rtol=1e-12)


def test_zero():
    eigenvalues, Q = eigenbasis(np.zeros((3, 3)))
    assert np.array_equal(eigenvalues, np.zeros(3))
    assert_close(Q.T @ Q, np.eye(3), rtol=1e-15)


@given(sizes, seeds, scales)
def test_qr_iteration_spans_what_the_matrix_makes_of_the_basis(d, seed, scale):
    rng = np.random.default_rng(seed)
    S, Q = scale * random_semidefinite(rng, d), random_orthogonal(rng, d)
    Q = Q[:, np.argsort(-np.diag(Q.T @ S @ Q))]
    turned = qr_iteration(S, Q)
    assert_close(turned.T @ turned, np.eye(d), rtol=1e-13)
    # turnedᵀ S Q is triangular: the first k columns span S times the first k, largest first
    below = np.tril(turned.T @ S @ Q, -1)
    assert np.abs(below).max() <= 1e-13 * np.linalg.norm(S, 2)


def off_diagonal(Q, S):
    """The share of S that Q leaves off the diagonal."""
    rotated = Q.T @ S @ Q
    return np.linalg.norm(rotated - np.diag(np.diag(rotated))) / np.linalg.norm(S)


@given(st.integers(2, 6), seeds, st.sampled_from([2.0, 10.0]))
def test_a_warm_step_improves_the_eigenbasis_of_a_matrix_that_has_changed_a_little(d, seed, ratio):
    rng = np.random.default_rng(seed)
    true = random_orthogonal(rng, d)
    S = true * ratio ** -np.arange(d) @ true.T
    T = np.eye(d) + 1e-3 * rng.normal(size=(d, d))
    changed = T @ S @ T.T
    Q = eigenbasis(S)[1]
    before = off_diagonal(Q, changed)
    # to first order a step takes each off-diagonal entry down by the ratio of its eigenvalues,
    # which is at most 1/2; the second order is 1e-3
    assert off_diagonal(qr_iteration(changed, Q), changed) < 0.6 * before


def test_warm_steps_on_a_singular_matrix_keep_its_eigenbasis():
    # two classes: g is always a multiple of (1, -1)
    S = np.array([[1.0, -1.0], [-1.0, 1.0]])
    Q = eigenbasis(S)[1]
    for scale in (1.0, 0.3, 1.7):
        Q = qr_iteration(scale * S, Q)
        assert off_diagonal(Q, S) < 1e-15


@pytest.mark.parametrize("rank", [1, 2])
def test_qr_iteration_stays_orthogonal_on_a_singular_matrix(rank):
    rng = np.random.default_rng(0)
    Q = random_orthogonal(rng, 5)
    for _ in range(20):
        Q = qr_iteration(random_semidefinite(rng, 5, rank), Q)
        assert_close(Q.T @ Q, np.eye(5), rtol=1e-13)


def test_qr_iteration_of_zero_is_orthogonal():
    Q = qr_iteration(np.zeros((3, 3)), np.eye(3))
    assert_close(Q.T @ Q, np.eye(3), rtol=1e-15)


def test_repeated_qr_iterations_find_the_eigenbasis():
    rng = np.random.default_rng(1)
    true = random_orthogonal(rng, 4)
    S = true * np.array([8.0, 4.0, 2.0, 1.0]) @ true.T
    Q = np.eye(4)
    for _ in range(60):  # off-diagonal entries halve at each step: 2^-60 < 1e-16
        Q = qr_iteration(S, Q)
    rotated = Q.T @ S @ Q
    assert np.abs(rotated - np.diag(np.diag(rotated))).max() < 1e-13 * 8
    assert_close(np.diag(rotated), np.array([8.0, 4.0, 2.0, 1.0]))


def test_an_eigenbasis_stays_one():
    S = np.diag([3.0, 2.0, 1.0])
    assert_close(np.abs(qr_iteration(S, np.eye(3))), np.eye(3), rtol=1e-15)


@given(sizes, sizes, seeds, scales)
def test_precondition_solves_with_the_matrix_it_stands_for(d_in, d_out, seed, scale):
    rng = np.random.default_rng(seed)
    Q_in, Q_out = random_orthogonal(rng, d_in), random_orthogonal(rng, d_out)
    D, M = scale * rng.uniform(0.1, 1, (d_out, d_in)), rng.normal(size=(d_out, d_in))
    Q = np.kron(Q_in, Q_out)
    expected = solve_dense(Q * vec_by_loops(D) @ Q.T, M)
    assert_close(precondition(M, Q_in, Q_out, D), expected)
