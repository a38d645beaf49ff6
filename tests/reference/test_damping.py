"""If this fails, a damping tuned for one method means another size, or another rule, in code."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tekfac_edu.reference import (
    EKFAC,
    KFAC,
    TEKFAC,
    TKFAC,
    KFACFactors,
    TraceRestrictedFactors,
    kfac_pi,
    trace_damping,
)

from .oracles import (
    Batch,
    assert_close,
    batches,
    fisher_by_loops,
    random_semidefinite,
    solve_dense,
    vec_by_loops,
)

dampings = st.floats(1e-3, 1e3)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 999))
def test_pi_is_the_root_of_the_ratio_of_mean_eigenvalues(d_in, d_out, seed):
    rng = np.random.default_rng(seed)
    A, G = random_semidefinite(rng, d_in), 1e-3 * random_semidefinite(rng, d_out)
    mean_A, mean_G = np.linalg.eigvalsh(A).mean(), np.linalg.eigvalsh(G).mean()
    assert kfac_pi(A, G) == pytest.approx(np.sqrt(mean_A / mean_G), rel=1e-12)


@pytest.mark.parametrize(("size_A", "size_G"), [(1e24, 1e-60), (1e-60, 1e24), (1e-60, 1e-60)])
def test_pi_of_extreme_factors(size_A, size_G):
    pi = kfac_pi(size_A * np.eye(3), size_G * np.eye(2))
    assert pi == pytest.approx(np.sqrt(size_A) / np.sqrt(size_G), rel=1e-12)


def test_kfac_adds_pi_to_the_inputs_and_its_inverse_to_the_outputs():
    # numbers small enough for pencil: π = √(8/2) = 2, √λ = 3
    curvature = KFAC.from_factors(KFACFactors(8 * np.eye(2), 2 * np.eye(3)))
    assert_close(curvature.dense(9.0), (8 + 6) * (2 + 1.5) * np.eye(6), rtol=1e-14)
    M = np.arange(6.0).reshape(3, 2)
    assert_close(curvature.precondition(M, 9.0), M / 49.0, rtol=1e-14)


def test_kfac_damping_is_not_tikhonov():
    A, G, damping = np.diag([4.0, 1.0]), np.diag([1.0, 3.0, 2.0]), 0.25
    dense = KFAC.from_factors(KFACFactors(A, G)).dense(damping)
    extra = dense - np.kron(A, G) - damping * np.eye(6)
    pi = np.sqrt(2.5 / 2.0)
    cross = np.kron(pi * 0.5 * np.eye(2), G) + np.kron(A, 0.5 / pi * np.eye(3))
    assert_close(extra, cross, rtol=1e-13)


def test_tkfac_shares_the_trace_between_its_factors():
    # √δ = 4, √λ = 0.5
    curvature = TKFAC.from_factors(TraceRestrictedFactors(16.0, np.eye(2) / 2, np.eye(4) / 4))
    assert_close(curvature.dense(0.25), (2 + 0.5) * (1 + 0.5) * np.eye(8), rtol=1e-14)
    M = np.arange(8.0).reshape(4, 2)
    assert_close(curvature.precondition(M, 0.25), M / 3.75, rtol=1e-14)


@pytest.mark.parametrize("method", [EKFAC, TEKFAC])
@given(batch=batches(scales=False), damping=dampings)
def test_the_corrected_methods_are_damped_by_tikhonov(method, batch, damping):
    curvature = method.fit(*batch.draw())
    added = damping * np.eye(batch.d_in * batch.d_out)
    assert_close(curvature.dense(damping), curvature.dense() + added)


@pytest.mark.parametrize("method", [EKFAC, TEKFAC])
def test_delta_does_not_stand_in_front_of_theta(method):
    curvature = method(
        Q_in=np.eye(2), Q_out=np.eye(3), eigenvalues=np.arange(1.0, 7.0).reshape(3, 2)
    )
    assert_close(curvature.dense(), np.diag([1.0, 3.0, 5.0, 2.0, 4.0, 6.0]), rtol=1e-15)
    assert_close(
        curvature.precondition(np.ones((3, 2)), 1.0),
        1 / np.array([[2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]),
        rtol=1e-14,
    )


@pytest.mark.parametrize("method", [KFAC, EKFAC, TKFAC, TEKFAC])
@given(batch=batches(scales=False, min_N=2))
def test_much_damping_leaves_the_gradient(method, batch):
    curvature = method.fit(*batch.draw())
    M = np.random.default_rng(0).normal(size=(batch.d_out, batch.d_in))
    damping = 1e20 * curvature.trace()
    # the factored rules come near λI as 1/√λ: √1e-20 times at most 10 dimensions
    assert_close(damping * curvature.precondition(M, damping), M, rtol=1e-8)


@pytest.mark.parametrize("method", [KFAC, EKFAC, TKFAC, TEKFAC])
@given(batch=batches(scales=False), damping=dampings)
def test_damping_in_the_gradients_units(method, batch, damping):
    """g twice as large: F and damping four times, the direction a quarter."""
    a, g = batch.draw()
    M = np.random.default_rng(0).normal(size=(batch.d_out, batch.d_in))
    once = method.fit(a, g).precondition(M, damping)
    assert_close(method.fit(a, 2 * g).precondition(M, 4 * damping), once / 4, rtol=1e-11)


@pytest.mark.parametrize(
    ("trace", "dim", "floor", "expected"),
    [(12.0, 6, 1e-3, 2.0), (1e-60, 6, 3.0, 0.5), (1e-60, 4, 0.0, 2.5e-61), (1e24, 2, 1.0, 5e23)],
)
def test_trace_damping_is_the_mean_eigenvalue_with_a_floor(trace, dim, floor, expected):
    assert trace_damping(trace, dim, floor) == pytest.approx(expected, rel=1e-15, abs=0.0)


def test_trace_damping_of_a_fit_is_the_mean_of_its_spectrum():
    a, g = Batch("", 6, 4, 3).draw()
    F = fisher_by_loops(a, g)
    curvature = TEKFAC.fit(a, g)
    damping = trace_damping(curvature.trace(), 12, 0.0)
    assert damping == pytest.approx(np.linalg.eigvalsh(F).mean(), rel=1e-12)
    assert damping == pytest.approx(vec_by_loops(curvature.eigenvalues).mean(), rel=1e-12)


@pytest.mark.parametrize("method", [KFAC, EKFAC, TKFAC, TEKFAC])
def test_factored_and_tikhonov_damping_both_solve_what_dense_shows(method):
    curvature = method.fit(*Batch("", 6, 4, 3, T=2, S=2).draw())
    M = np.random.default_rng(0).normal(size=(3, 4))
    for damping in (1e-2, 1.0, 1e2):
        expected = solve_dense(curvature.dense(damping), M)
        assert_close(curvature.precondition(M, damping), expected, rtol=1e-9)
