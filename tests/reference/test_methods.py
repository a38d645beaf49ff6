"""If this fails, one of the four methods is not what its name says, or its solve is not a solve."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given

from tekfac_edu.reference import EKFAC, KFAC, TEKFAC, TKFAC

from .methods import every_method
from .oracles import (
    BATCHES,
    SHAPES,
    Batch,
    assert_close,
    batches,
    corrected_eigenvalues_by_loops,
    fisher_by_loops,
    kfac_factors_by_loops,
    solve_dense,
    trace_restricted_numerators_by_loops,
    vec_by_loops,
)

MEASURED = [EKFAC, TEKFAC]
every_batch = pytest.mark.parametrize("batch", BATCHES, ids=lambda b: b.name)


def dense_by_hand(method, a, g, curvature, damping):
    """The spec's damped matrix from loops; a measured method's basis is taken from the object."""
    A, G = kfac_factors_by_loops(a, g)
    delta, left, right = trace_restricted_numerators_by_loops(a, g)
    I_in, I_out, root = np.eye(len(A)), np.eye(len(G)), np.sqrt(damping)
    if method is KFAC:
        pi = np.sqrt((np.trace(A) / len(A)) / (np.trace(G) / len(G)))
        return np.kron(A + pi * root * I_in, G + root / pi * I_out)
    if method is TKFAC:
        Phi, Psi = left / delta, right / delta
        return np.kron(np.sqrt(delta) * Phi + root * I_in, np.sqrt(delta) * Psi + root * I_out)
    Q = np.kron(curvature.Q_in, curvature.Q_out)
    D = corrected_eigenvalues_by_loops(a, g, curvature.Q_in, curvature.Q_out)
    return Q @ np.diag(vec_by_loops(D) + damping) @ Q.T


def mean_eigenvalue(a, g):
    """tr F / dim, F's own size: damping in the block's units."""
    F = fisher_by_loops(a, g)
    return np.trace(F) / len(F)


@every_method
@every_batch
def test_undamped_matrix_by_hand(method, batch):
    a, g = batch.draw()
    curvature = method.fit(a, g)
    assert_close(curvature.dense(), dense_by_hand(method, a, g, curvature, 0.0), rtol=1e-12)


@every_method
@every_batch
@pytest.mark.parametrize("relative_damping", [1e-3, 1.0])
def test_damped_matrix_by_hand(method, batch, relative_damping):
    a, g = batch.draw()
    curvature = method.fit(a, g)
    damping = relative_damping * mean_eigenvalue(a, g)
    expected = dense_by_hand(method, a, g, curvature, damping)
    assert_close(curvature.dense(damping), expected, rtol=1e-12)


@every_method
@every_batch
def test_precondition_solves_with_the_damped_matrix(method, batch):
    a, g = batch.draw()
    curvature = method.fit(a, g)
    M = np.random.default_rng(7).normal(size=(batch.d_out, batch.d_in))
    damping = 0.1 * mean_eigenvalue(a, g)
    # condition number below 20·10/0.1 (largest eigenvalue <= 20 mean ones): 2e3·20·eps < 1e-11
    expected = solve_dense(curvature.dense(damping), M)
    assert_close(curvature.precondition(M, damping), expected, rtol=1e-10)
    by_hand = solve_dense(dense_by_hand(method, a, g, curvature, damping), M)
    assert_close(curvature.precondition(M, damping), by_hand, rtol=1e-10)


@every_method
@given(batch=batches())
def test_precondition_solves_for_any_batch(method, batch):
    a, g = batch.draw()
    curvature = method.fit(a, g)
    M = np.random.default_rng(7).normal(size=(batch.d_out, batch.d_in))
    damping = 0.1 * mean_eigenvalue(a, g)
    expected = solve_dense(curvature.dense(damping), M)
    assert_close(curvature.precondition(M, damping), expected, rtol=1e-10)


@every_method
@every_batch
def test_undamped_solve_needs_no_damping_where_the_matrix_is_regular(method, batch):
    batch = dataclasses.replace(batch, N=200)
    a, g = batch.draw()
    curvature = method.fit(a, g)
    F = curvature.dense()
    # 1e4 · 20 dimensions · 2.2e-16 < 1e-10
    assert np.linalg.cond(F) < 1e4, "the case is meant to be regular"
    M = np.random.default_rng(7).normal(size=(batch.d_out, batch.d_in))
    assert_close(curvature.precondition(M, 0.0), solve_dense(F, M), rtol=1e-10)


@every_method
@every_batch
def test_eigenvalues_basis_and_trace_belong_together(method, batch):
    a, g = batch.draw()
    curvature = method.fit(a, g)
    assert curvature.eigenvalues.shape == (batch.d_out, batch.d_in)
    Q = np.kron(curvature.Q_in, curvature.Q_out)
    assert_close(Q.T @ Q, np.eye(batch.d_in * batch.d_out), rtol=1e-13)
    dense = curvature.dense()
    assert_close(Q * vec_by_loops(curvature.eigenvalues) @ Q.T, dense)
    assert curvature.trace() == pytest.approx(np.trace(dense), rel=1e-12, abs=0.0)
    assert curvature.trace() == pytest.approx(curvature.eigenvalues.sum(), rel=1e-12, abs=0.0)
    assert (curvature.eigenvalues >= -1e-14 * curvature.trace()).all()


@every_batch
def test_bases_diagonalize_the_factors(batch):
    a, g = batch.draw()
    A, G = kfac_factors_by_loops(a, g)
    delta, left, right = trace_restricted_numerators_by_loops(a, g)
    for method, factor_in, factor_out in (
        (KFAC, A, G),
        (EKFAC, A, G),
        (TKFAC, left / delta, right / delta),
        (TEKFAC, left / delta, right / delta),
    ):
        curvature = method.fit(a, g)
        for Q, S in ((curvature.Q_in, factor_in), (curvature.Q_out, factor_out)):
            rotated = Q.T @ S @ Q
            off_diagonal = rotated - np.diag(np.diag(rotated))
            assert np.abs(off_diagonal).max() <= 1e-13 * np.trace(S)


@pytest.mark.parametrize("method", MEASURED)
def test_a_measured_method_can_be_built_from_its_three_arrays(method):
    fitted = method.fit(*Batch("", 6, 4, 3).draw())
    built = method(Q_in=fitted.Q_in, Q_out=fitted.Q_out, eigenvalues=fitted.eigenvalues)
    M = np.ones((3, 4))
    assert np.array_equal(built.precondition(M, 0.1), fitted.precondition(M, 0.1))
    assert np.array_equal(built.dense(0.1), fitted.dense(0.1))


@pytest.mark.parametrize("method", MEASURED)
def test_signs_and_order_of_the_basis_do_not_matter(method):
    fitted = method.fit(*Batch("", 6, 4, 3).draw())
    order_in, order_out = [2, 0, 3, 1], [1, 2, 0]
    other = method(
        Q_in=(fitted.Q_in * [1, -1, -1, 1])[:, order_in],
        Q_out=(fitted.Q_out * [-1, 1, -1])[:, order_out],
        eigenvalues=fitted.eigenvalues[np.ix_(order_out, order_in)],
    )
    M = np.random.default_rng(0).normal(size=(3, 4))
    assert_close(other.precondition(M, 0.1), fitted.precondition(M, 0.1))
    assert_close(other.dense(), fitted.dense())


@every_method
def test_frozen(method):
    curvature = method.fit(*Batch("", 6, 4, 3).draw())
    name = dataclasses.fields(curvature)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(curvature, name, None)


@every_method
@pytest.mark.parametrize("batch", SHAPES[:4], ids=lambda b: b.name)
def test_layout_and_dtype_of_the_input_do_not_matter(method, batch):
    a, g = (x.astype(np.float32) for x in batch.draw())
    M = np.random.default_rng(7).normal(size=(batch.d_out, batch.d_in))
    expected = method.fit(a.astype(np.float64), g.astype(np.float64)).precondition(M, 0.5)
    assert np.array_equal(method.fit(a, g).precondition(M, 0.5), expected)
    strided = np.repeat(a, 2, axis=0)[::2], np.repeat(g, 2, axis=-1)[..., ::2]
    for a_other, g_other in ((np.asfortranarray(a), np.asfortranarray(g)), strided):
        actual = method.fit(a_other, g_other).precondition(np.asfortranarray(M), 0.5)
        assert_close(actual, expected, rtol=1e-11)


@every_method
def test_inputs_stay_as_they_were_and_are_not_held(method):
    a, g = Batch("", 6, 4, 3).draw()
    a_before, g_before, M = a.copy(), g.copy(), np.ones((3, 4))
    curvature = method.fit(a, g)
    first = curvature.precondition(M, 0.1)
    assert np.array_equal(a, a_before)
    assert np.array_equal(g, g_before)
    assert np.array_equal(M, np.ones((3, 4)))
    a[:], g[:] = 0.0, 0.0
    assert np.array_equal(curvature.precondition(M, 0.1), first)


@every_method
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e12])
def test_a_singular_curvature_asks_for_damping(method, scale):
    a, g = Batch("", N=2, d_in=4, d_out=3, scale_a=scale, scale_g=scale).draw()
    with pytest.raises(ValueError, match="damping"):
        method.fit(a, g).precondition(np.ones((3, 4)), 0.0)


@pytest.mark.parametrize("method", [EKFAC, TKFAC, TEKFAC])
def test_without_gradients_only_the_damping_is_left(method):
    curvature = method.fit(np.ones((3, 4)), np.zeros((3, 2)))
    assert curvature.trace() == 0.0
    M = np.random.default_rng(0).normal(size=(2, 4))
    assert_close(curvature.precondition(M, 0.5), M / 0.5, rtol=1e-13)


def test_kfac_without_gradients_gives_a_finite_step_or_says_why_not():
    # π = √(tr A/d_in / (tr G/d_out)) is 1/0 here, and the papers say nothing
    curvature = KFAC.fit(np.ones((3, 4)), np.zeros((3, 2)))
    try:
        direction = curvature.precondition(np.ones((2, 4)), 0.5)
    except ValueError:
        return
    assert np.isfinite(direction).all()
    assert_close(direction, solve_dense(curvature.dense(0.5), np.ones((2, 4))), rtol=1e-10)
