"""If this fails, rows and columns are mixed up, and the book's dense matrices are permuted ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tekfac_edu.reference import (
    TKFAC,
    fisher_block,
    kron_apply,
    kronecker_power_iteration,
    nearest_kronecker_product,
    partial_traces,
    rearrange,
    split_vecs,
    stack_vecs,
    to_row_order,
    unrearrange,
    unvec,
    vec,
)

from .oracles import (
    SHAPES,
    Batch,
    assert_close,
    batches,
    fisher_by_loops,
    random_semidefinite,
    rearranged_by_loops,
    unvec_by_loops,
    vec_by_loops,
)

sizes = st.integers(1, 4)
seeds = st.integers(0, 2**16)


def test_vec_stacks_columns():
    assert vec(np.array([[1.0, 3.0, 5.0], [2.0, 4.0, 6.0]])).tolist() == [1, 2, 3, 4, 5, 6]


def test_unvec_fills_columns():
    M = unvec(np.arange(1.0, 7.0), 2, 3)
    assert M.tolist() == [[1, 3, 5], [2, 4, 6]]


@given(sizes, sizes, seeds)
def test_vec_and_unvec_are_inverse(d_out, d_in, seed):
    M = np.random.default_rng(seed).normal(size=(d_out, d_in))
    assert np.array_equal(vec(M), vec_by_loops(M))
    assert np.array_equal(unvec(vec(M), d_out, d_in), M)
    assert np.array_equal(vec(np.asfortranarray(M)), vec_by_loops(M))
    assert np.array_equal(vec(M.T), vec_by_loops(M.T))


@given(sizes, sizes, seeds)
def test_kron_apply_is_the_dense_product(d_out, d_in, seed):
    rng = np.random.default_rng(seed)
    A, B = rng.normal(size=(d_in, d_in)), rng.normal(size=(d_out, d_out))
    M = rng.normal(size=(d_out, d_in))
    assert_close(kron_apply(A, B, M), unvec_by_loops(np.kron(A, B) @ vec_by_loops(M), d_out, d_in))


@given(batches(positions=False, vectors=False, scales=False))
def test_row_order_is_what_flattening_in_numpy_gives(batch):
    a, g = batch.draw()
    rows = (g[:, :, None] * a[:, None, :]).reshape(batch.N, -1)
    in_row_order = to_row_order(fisher_by_loops(a, g), batch.d_in, batch.d_out)
    assert_close(in_row_order, rows.T @ rows / batch.N)


@given(sizes, sizes, seeds)
def test_row_order_swaps_the_factors(d_in, d_out, seed):
    rng = np.random.default_rng(seed)
    A, B = rng.normal(size=(d_in, d_in)), rng.normal(size=(d_out, d_out))
    assert np.array_equal(to_row_order(np.kron(A, B), d_in, d_out), np.kron(B, A))


@given(sizes, sizes, seeds)
def test_rearrangement_entry_by_entry(d_in, d_out, seed):
    rng = np.random.default_rng(seed)
    F = rng.normal(size=(d_in * d_out,) * 2)
    R = rearrange(F, d_in, d_out)
    assert np.array_equal(R, rearranged_by_loops(F, d_in, d_out))
    assert np.array_equal(unrearrange(R, d_in, d_out), F)


@given(sizes, sizes, seeds)
def test_rearrangement_makes_a_kronecker_product_rank_one(d_in, d_out, seed):
    rng = np.random.default_rng(seed)
    A, B = rng.normal(size=(d_in, d_in)), rng.normal(size=(d_out, d_out))
    R = np.outer(vec_by_loops(A), vec_by_loops(B))
    assert_close(rearrange(np.kron(A, B), d_in, d_out), R, rtol=1e-15)
    assert_close(unrearrange(R, d_in, d_out), np.kron(A, B), rtol=1e-15)


@given(sizes, sizes, seeds)
def test_partial_traces_of_a_kronecker_product(d_in, d_out, seed):
    rng = np.random.default_rng(seed)
    A, B = random_semidefinite(rng, d_in), random_semidefinite(rng, d_out)
    left, right = partial_traces(np.kron(A, B), d_in, d_out)
    assert_close(left, np.trace(B) * A)
    assert_close(right, np.trace(A) * B)


@given(sizes, sizes, seeds)
def test_partial_traces_sum_blocks(d_in, d_out, seed):
    F = np.random.default_rng(seed).normal(size=(d_in * d_out,) * 2)
    left, right = np.zeros((d_in, d_in)), np.zeros((d_out, d_out))
    for p in range(d_in):
        for q in range(d_in):
            block = F[p * d_out : (p + 1) * d_out, q * d_out : (q + 1) * d_out]
            left[p, q] = sum(block[i, i] for i in range(d_out))
            right += block if p == q else 0.0
    actual_left, actual_right = partial_traces(F, d_in, d_out)
    assert_close(actual_left, left)
    assert_close(actual_right, right)


@given(sizes, sizes, seeds, st.sampled_from([1.0, 1e-120, 1e48]))
def test_nearest_kronecker_product_recovers_one(d_in, d_out, seed, scale):
    rng = np.random.default_rng(seed)
    F = scale * np.kron(random_semidefinite(rng, d_in), random_semidefinite(rng, d_out))
    A, B = nearest_kronecker_product(F, d_in, d_out)
    assert_close(np.kron(A, B), F)
    assert np.linalg.norm(A) == pytest.approx(np.linalg.norm(B), rel=1e-12)
    assert np.trace(A) > 0


@given(sizes, sizes, seeds)
def test_nearest_kronecker_product_keeps_a_negative_sign(d_in, d_out, seed):
    rng = np.random.default_rng(seed)
    F = -np.kron(random_semidefinite(rng, d_in), random_semidefinite(rng, d_out))
    A, B = nearest_kronecker_product(F, d_in, d_out)
    assert_close(np.kron(A, B), F)
    assert np.trace(A) >= 0


@given(batches(scales=False))
def test_nearest_kronecker_product_leaves_what_eckart_and_young_say(batch):
    F = fisher_by_loops(*batch.draw())
    A, B = nearest_kronecker_product(F, batch.d_in, batch.d_out)
    singular = np.linalg.svd(rearranged_by_loops(F, batch.d_in, batch.d_out), compute_uv=False)
    distance = np.linalg.norm(F - np.kron(A, B))
    assert abs(distance - np.linalg.norm(singular[1:])) <= 1e-12 * singular[0]


@given(batches(scales=False, min_N=2), seeds)
def test_no_other_kronecker_product_is_nearer(batch, seed):
    F = fisher_by_loops(*batch.draw())
    A, B = nearest_kronecker_product(F, batch.d_in, batch.d_out)
    best = np.linalg.norm(F - np.kron(A, B))
    rng = np.random.default_rng(seed)
    for size in (1e-3, 1e-1):
        A_other = A + size * np.abs(A).max() * rng.normal(size=A.shape)
        B_other = B + size * np.abs(B).max() * rng.normal(size=B.shape)
        other = np.linalg.norm(F - np.kron(A_other, B_other))
        assert best <= other + 1e-13 * np.linalg.norm(F)


WITHOUT_POSITIONS = [b for b in SHAPES if b.T in (None, 1)]
without_positions = pytest.mark.parametrize("batch", WITHOUT_POSITIONS, ids=lambda b: b.name)


@without_positions
def test_one_power_step_is_tkfac_once_it_is_scaled_to_keep_the_trace(batch):
    a, g = batch.draw()
    F = fisher_block(a, g)
    step = np.kron(*kronecker_power_iteration(F, batch.d_in, batch.d_out, steps=1))
    assert_close(step * np.trace(F) / np.trace(step), TKFAC.fit(a, g).dense())


@given(batches(positions=False, scales=False), st.integers(1, 6))
def test_power_steps_have_the_least_squares_scale(batch, steps):
    F = fisher_by_loops(*batch.draw())
    K = np.kron(*kronecker_power_iteration(F, batch.d_in, batch.d_out, steps=steps))
    assert np.sum(F * K) == pytest.approx(np.sum(K * K), rel=1e-12)


def test_many_power_steps_reach_the_nearest_kronecker_product():
    F = fisher_by_loops(*Batch("", N=40, d_in=4, d_out=3, seed=5).draw())
    norm = np.linalg.norm(F)
    errors = []
    for steps in (1, 2, 3, 60):
        A, B = kronecker_power_iteration(F, 4, 3, steps=steps)
        errors.append(np.linalg.norm(F - np.kron(A, B)) / norm)
    optimum = nearest_kronecker_product(F, 4, 3)
    best = np.linalg.norm(F - np.kron(*optimum)) / norm
    assert errors[0] > errors[1] > errors[2] > best
    assert_close(np.kron(A, B), np.kron(*optimum), rtol=1e-9)


def test_stack_and_split():
    rng = np.random.default_rng(0)
    matrices = [rng.normal(size=shape) for shape in ((2, 3), (1, 4), (3, 1))]
    v = stack_vecs(matrices)
    assert np.array_equal(v, np.concatenate([vec_by_loops(M) for M in matrices]))
    back = split_vecs(v, [M.shape for M in matrices])
    assert len(back) == 3
    assert all(np.array_equal(M, N) for M, N in zip(matrices, back, strict=True))
