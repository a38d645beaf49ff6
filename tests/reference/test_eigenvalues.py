"""If this fails, EKFAC and TEKFAC use eigenvalues of other directions or of other gradients."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tekfac_edu.reference import corrected_eigenvalues, move_eigenvalues

from .oracles import (
    BATCHES,
    Batch,
    assert_close,
    batches,
    corrected_eigenvalues_by_loops,
    fisher_by_loops,
    gradients_by_loops,
    random_orthogonal,
    unvec_by_loops,
    vec_by_loops,
)

sizes = st.integers(1, 5)
seeds = st.integers(0, 2**16)


def drawn_bases(seed, d_in, d_out):
    rng = np.random.default_rng(seed)
    return random_orthogonal(rng, d_in), random_orthogonal(rng, d_out)


@pytest.mark.parametrize("batch", BATCHES, ids=lambda b: b.name)
def test_squares_of_projected_gradients_by_loops(batch):
    a, g = batch.draw()
    Q_in, Q_out = drawn_bases(3, batch.d_in, batch.d_out)
    D = corrected_eigenvalues(a, g, Q_in, Q_out)
    assert_close(D, corrected_eigenvalues_by_loops(a, g, Q_in, Q_out))
    assert (D >= 0).all()


@given(batches(), seeds)
def test_the_diagonal_of_the_block_in_that_basis(batch, seed):
    a, g = batch.draw()
    Q_in, Q_out = drawn_bases(seed, batch.d_in, batch.d_out)
    Q = np.kron(Q_in, Q_out)
    diagonal = np.diag(Q.T @ fisher_by_loops(a, g) @ Q)
    D = corrected_eigenvalues(a, g, Q_in, Q_out)
    assert_close(D, unvec_by_loops(diagonal, batch.d_out, batch.d_in))


@given(batches(), seeds)
def test_sum_is_the_mean_squared_gradient(batch, seed):
    a, g = batch.draw()
    D = corrected_eigenvalues(a, g, *drawn_bases(seed, batch.d_in, batch.d_out))
    G = gradients_by_loops(a, g)
    assert D.sum() == pytest.approx((G**2).sum() / batch.N, rel=1e-12, abs=0.0)


def test_positions_are_added_before_squaring():
    # two positions whose gradients cancel: the example's gradient, and so its square, is zero
    a, g = np.ones((1, 2, 3)), np.array([[[1.0, 2.0], [-1.0, -2.0]]])
    assert np.array_equal(corrected_eigenvalues(a, g, np.eye(3), np.eye(2)), np.zeros((2, 3)))


def test_vectors_are_squared_before_adding():
    a, g = np.ones((1, 3)), np.array([[[1.0, 2.0]], [[-1.0, -2.0]]])
    expected = np.array([[2.0] * 3, [8.0] * 3])
    assert_close(corrected_eigenvalues(a, g, np.eye(3), np.eye(2)), expected, rtol=1e-15)


def test_many_positions_take_the_same_value_as_loops():
    # many positions and few features: another order of multiplication pays there
    a, g = Batch("", N=2, d_in=2, d_out=3, T=40, S=2).draw()
    Q_in, Q_out = drawn_bases(0, 2, 3)
    expected = corrected_eigenvalues_by_loops(a, g, Q_in, Q_out)
    assert_close(corrected_eigenvalues(a, g, Q_in, Q_out), expected)


@given(sizes, sizes, seeds, st.sampled_from([1.0, 1e-120, 1e48]))
def test_moved_eigenvalues_are_the_diagonal_in_the_new_basis(d_in, d_out, seed, scale):
    rng = np.random.default_rng(seed)
    D = scale * rng.exponential(size=(d_out, d_in))
    old, new = drawn_bases(seed + 1, d_in, d_out), drawn_bases(seed + 2, d_in, d_out)
    moved = move_eigenvalues(D, *old, *new)
    Q_old, Q_new = np.kron(*old), np.kron(*new)
    old_matrix = Q_old @ np.diag(vec_by_loops(D)) @ Q_old.T
    expected = unvec_by_loops(np.diag(Q_new.T @ old_matrix @ Q_new), d_out, d_in)
    assert_close(moved, expected)
    assert moved.sum() == pytest.approx(D.sum(), rel=1e-12, abs=0.0)
    assert (moved >= 0).all()


@given(sizes, sizes, seeds)
def test_moving_is_blind_to_signs_and_order(d_in, d_out, seed):
    rng = np.random.default_rng(seed)
    D = rng.exponential(size=(d_out, d_in))
    Q_in, Q_out = drawn_bases(seed, d_in, d_out)
    order_in, order_out = rng.permutation(d_in), rng.permutation(d_out)
    new_in = (Q_in * rng.choice([-1.0, 1.0], d_in))[:, order_in]
    new_out = (Q_out * rng.choice([-1.0, 1.0], d_out))[:, order_out]
    moved = move_eigenvalues(D, Q_in, Q_out, new_in, new_out)
    assert_close(moved, D[np.ix_(order_out, order_in)])
    # and what the pair stands for has not moved at all
    other_in, other_out = drawn_bases(seed + 1, d_in, d_out)
    assert_close(
        move_eigenvalues(moved, new_in, new_out, other_in, other_out),
        move_eigenvalues(D, Q_in, Q_out, other_in, other_out),
    )


def test_an_average_taken_across_bases_without_moving_is_wrong():
    a, g = Batch("", N=50, d_in=3, d_out=2).draw()
    old, new = drawn_bases(0, 3, 2), drawn_bases(1, 3, 2)
    before = corrected_eigenvalues(a, g, *old)
    after = corrected_eigenvalues(a, g, *new)
    moved = move_eigenvalues(before, *old, *new)
    assert np.linalg.norm(moved - before) > 0.1 * np.linalg.norm(before)
    assert np.linalg.norm(after - before) > 0.1 * np.linalg.norm(before)
