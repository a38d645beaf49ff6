"""If this fails, a theorem the book prints in a box is not true of the code, or not true at all."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tekfac_edu.reference import (
    EKFAC,
    KFAC,
    MLP,
    TEKFAC,
    TKFAC,
    TraceRestrictedFactors,
    corrected_eigenvalues,
    eigenbasis,
    fisher_block,
    kfac_factors,
    kronecker_power_iteration,
    nearest_kronecker_product,
    rearrange,
    trace_restricted_factors,
)

from .methods import METHODS, every_method
from .oracles import (
    Batch,
    assert_close,
    batches,
    fisher_by_loops,
    full_axes,
    gradients_by_loops,
    random_orthogonal,
    rearranged_by_loops,
    solve_dense,
    unvec_by_loops,
    vec_by_loops,
)

PAIRS = [(KFAC, EKFAC), (TKFAC, TEKFAC)]
seeds = st.integers(0, 2**16)


def position_diagonal_trace(a, g):
    """E[Σ_t ‖ā_t‖² Σ_s ‖g_st‖²]: the trace of F without products of different positions."""
    a, g = full_axes(a, g)
    return sum(
        (a[n, t] ** 2).sum() * (g[:, n, t] ** 2).sum()
        for n in range(len(a))
        for t in range(a.shape[1])
    ) / len(a)


# 1. Trace.


@pytest.mark.parametrize("method", [EKFAC, TEKFAC])
@given(batch=batches())
def test_the_corrected_methods_keep_the_trace_of_the_true_block(method, batch):
    a, g = batch.draw()
    trace = np.trace(fisher_by_loops(a, g))
    assert method.fit(a, g).trace() == pytest.approx(trace, rel=1e-12, abs=0.0)


@given(batches(positions=False))
def test_tkfac_keeps_the_trace(batch):
    a, g = batch.draw()
    trace = np.trace(fisher_by_loops(a, g))
    assert TKFAC.fit(a, g).trace() == pytest.approx(trace, rel=1e-12, abs=0.0)


@given(batches())
def test_tkfac_keeps_the_trace_of_the_position_diagonal_part(batch):
    a, g = batch.draw()
    trace = position_diagonal_trace(a, g)
    assert TKFAC.fit(a, g).trace() == pytest.approx(trace, rel=1e-12, abs=0.0)


@given(batches(positions=False, scales=False))
def test_kfacs_trace_gap_is_a_covariance(batch):
    a, g = batch.draw()
    vectors = g if batch.S else g[None]
    norms_in, norms_out = (a**2).sum(1), (vectors**2).sum((0, 2))
    covariance = np.cov(norms_in, norms_out, bias=True)[0, 1] if batch.N > 1 else 0.0
    trace = np.trace(fisher_by_loops(a, g))
    gap = trace - KFAC.fit(a, g).trace()
    # difference of two traces: 1e-13 of the larger one
    assert abs(gap - covariance) <= 1e-13 * max(trace, KFAC.fit(a, g).trace())


def test_kfac_does_not_keep_the_trace():
    a, g = Batch("", N=40, d_in=4, d_out=3).draw()
    trace = np.trace(fisher_by_loops(a, g))
    assert abs(KFAC.fit(a, g).trace() - trace) > 0.1 * trace


# 2. Dominance and the right triangle.


@pytest.mark.parametrize(("plain", "corrected"), PAIRS)
@given(batch=batches())
def test_right_triangle_and_dominance(plain, corrected, batch):
    a, g = batch.draw()
    F = fisher_by_loops(a, g)
    dense_plain, dense_corrected = plain.fit(a, g).dense(), corrected.fit(a, g).dense()
    unit = np.linalg.norm(F) + np.linalg.norm(dense_plain)
    hypotenuse = np.linalg.norm(F - dense_plain) / unit
    leg = np.linalg.norm(F - dense_corrected) / unit
    other_leg = np.linalg.norm(dense_corrected - dense_plain) / unit
    assert abs(hypotenuse**2 - leg**2 - other_leg**2) <= 1e-12
    # where both vanish rounding decides
    assert leg <= hypotenuse + 1e-13


@given(batches(scales=False), seeds)
def test_measured_second_moments_are_the_best_diagonal_in_any_basis(batch, seed):
    a, g = batch.draw()
    F = fisher_by_loops(a, g)
    rng = np.random.default_rng(seed)
    Q_in, Q_out = random_orthogonal(rng, batch.d_in), random_orthogonal(rng, batch.d_out)
    D = corrected_eigenvalues(a, g, Q_in, Q_out)
    Q = np.kron(Q_in, Q_out)

    def distance(diagonal):
        return np.linalg.norm(F - Q * vec_by_loops(diagonal) @ Q.T)

    best = distance(D)
    for size in (1e-3, 1.0):
        other = D + size * D.max() * rng.normal(size=D.shape)
        # how much worse is known exactly: the two matrices differ by a diagonal, at a right angle
        expected = np.hypot(best, np.linalg.norm(other - D))
        assert distance(other) == pytest.approx(expected, rel=1e-12)


def test_nothing_orders_tekfac_against_ekfac():
    wins = 0
    for seed in range(60):
        a, g = Batch("", N=12, d_in=3, d_out=3, seed=seed).draw()
        F = fisher_by_loops(a, g)
        distance = [np.linalg.norm(F - m.fit(a, g).dense()) for m in (TEKFAC, EKFAC)]
        wins += distance[0] < distance[1]
    assert 30 < wins < 60


# 3. Exact cases, independence, invariance.


@every_method
@given(batch=batches(positions=False, max_N=1))
def test_one_example_is_exact(method, batch):
    a, g = batch.draw()
    assert_close(method.fit(a, g).dense(), fisher_by_loops(a, g))


@every_method
def test_one_example_with_positions_is_not(method):
    a, g = Batch("", N=1, d_in=3, d_out=3, T=4).draw()
    F = fisher_by_loops(a, g)
    assert np.linalg.norm(method.fit(a, g).dense() - F) > 1e-2 * np.linalg.norm(F)


@every_method
@given(seed=seeds, widths=st.lists(st.integers(1, 4), min_size=2, max_size=4))
def test_deep_linear_networks_with_squared_error_are_exact(method, seed, widths):
    x = np.random.default_rng(seed).normal(size=(6, widths[0]))
    mlp = MLP(widths, activation="identity", rng=seed)
    for layer in mlp.layer_statistics(x, fisher="exact", loss="squared_error"):
        F = fisher_by_loops(layer.a, layer.g)
        assert_close(method.fit(layer.a, layer.g).dense(), F)


@every_method
def test_the_same_network_with_tanh_is_not_exact(method):
    x = np.random.default_rng(0).normal(size=(6, 3))
    mlp = MLP([3, 4, 2], activation="tanh", rng=0)
    layer = mlp.layer_statistics(x, fisher="exact", loss="squared_error")[0]
    F = fisher_by_loops(layer.a, layer.g)
    assert np.linalg.norm(method.fit(layer.a, layer.g).dense() - F) > 1e-3 * np.linalg.norm(F)


@given(batches(positions=False, vectors=False, scales=False))
def test_every_input_with_every_gradient_is_independence(batch):
    a, g = batch.draw()
    every_a, every_g = np.repeat(a, batch.N, axis=0), np.tile(g, (batch.N, 1))
    F = fisher_by_loops(every_a, every_g)
    for method in METHODS:
        assert_close(method.fit(every_a, every_g).dense(), F)
    kfac, tkfac = kfac_factors(every_a, every_g), trace_restricted_factors(every_a, every_g)
    assert_close(tkfac.Phi, kfac.A / np.trace(kfac.A))
    assert_close(tkfac.Psi, kfac.G / np.trace(kfac.G))


def test_independent_draws_bring_tkfac_to_kfac_as_the_root_of_their_number():
    distances = []
    for N in (400, 40_000):
        rng = np.random.default_rng(0)
        a, g = rng.normal(size=(N, 3)), rng.normal(size=(N, 2))
        distances.append(np.linalg.norm(TKFAC.fit(a, g).dense() - KFAC.fit(a, g).dense()))
    # E[d²] = C/N; d is a norm of 36 nearly Gaussian entries, so each is within a factor 3
    assert distances[1] < distances[0] * 3 / np.sqrt(100)


def regular_case(seed=3):
    a, g = Batch("", N=60, d_in=3, d_out=2, seed=seed).draw()
    rng = np.random.default_rng(seed)
    return a, g, rng.normal(size=(2, 3)), rng


def transformed(a, T):
    """Inputs Tā, and the gradient M Tᵀ of the weights W T⁻¹ that make the same function."""
    return a @ T.T


@given(seeds)
def test_the_exact_block_steps_the_same_function_in_any_coordinates(seed):
    a, g, M, rng = regular_case()
    T = random_orthogonal(rng, 3) @ np.diag([1.0, 3.0, 0.3]) @ random_orthogonal(rng, 3)
    step = solve_dense(fisher_block(a, g), M)
    other = solve_dense(fisher_block(transformed(a, T), g), M @ T.T)
    # condition of the block about 1e3, of T 10 (twice squared): 1e3·1e2·eps < 1e-10
    assert_close(other @ T, step, rtol=1e-10)


@given(seeds)
def test_so_does_kfac(seed):
    a, g, M, _ = regular_case()
    rng = np.random.default_rng(seed)
    T = random_orthogonal(rng, 3) @ np.diag([1.0, 3.0, 0.3]) @ random_orthogonal(rng, 3)
    step = KFAC.fit(a, g).precondition(M, 0.0)
    other = KFAC.fit(transformed(a, T), g).precondition(M @ T.T, 0.0)
    assert_close(other @ T, step, rtol=1e-10)


@pytest.mark.parametrize("method", [EKFAC, TKFAC, TEKFAC])
def test_the_others_do_not(method):
    a, g, M, _ = regular_case()
    T = np.array([[1.0, 0.5, 0.0], [0.0, 3.0, 1.0], [0.0, 0.0, 0.3]])
    step = method.fit(a, g).precondition(M, 0.0)
    other = method.fit(transformed(a, T), g).precondition(M @ T.T, 0.0) @ T
    assert np.linalg.norm(other - step) > 1e-2 * np.linalg.norm(step)


@every_method
@given(batch=batches(scales=False), seed=seeds)
def test_an_orthogonal_change_of_inputs_changes_nothing(method, batch, seed):
    a, g = batch.draw()
    curvature = method.fit(a, g)
    rng = np.random.default_rng(seed)
    T = random_orthogonal(rng, batch.d_in)
    M = rng.normal(size=(batch.d_out, batch.d_in))
    # a basis is determined where eigenvalues differ; error in it is eps over the gap
    for S in (kfac_factors(a, g), trace_restricted_factors(a, g)):
        for factor in (S.S_in, S.S_out):
            eigenvalues = np.linalg.eigvalsh(factor)
            present = eigenvalues[eigenvalues > 1e-12 * eigenvalues[-1]]
            assume((np.diff(present) > 1e-3 * eigenvalues[-1]).all())
            assume(present[0] > 1e-3 * eigenvalues[-1])
    damping = 0.1 * curvature.trace() / M.size
    step = curvature.precondition(M, damping)
    other = method.fit(transformed(a, T), g).precondition(M @ T.T, damping) @ T
    assert_close(other, step, rtol=1e-9)


# 4. Degenerate agreement.


@given(batches(scales=False))
def test_tekfac_on_kfacs_factors_is_ekfac(batch):
    a, g = batch.draw()
    kfac = kfac_factors(a, g)
    factors = TraceRestrictedFactors(1.0, kfac.A, kfac.G)
    (_, Q_in), (_, Q_out) = eigenbasis(factors.Phi), eigenbasis(factors.Psi)
    tekfac = TEKFAC(Q_in, Q_out, corrected_eigenvalues(a, g, Q_in, Q_out))
    ekfac = EKFAC.fit(a, g)
    M = np.random.default_rng(0).normal(size=(batch.d_out, batch.d_in))
    damping = 0.1 * ekfac.trace() / M.size
    assert_close(tekfac.precondition(M, damping), ekfac.precondition(M, damping), rtol=1e-11)


@given(batches(scales=False))
def test_tkfac_on_kfacs_factors_is_kfac_undamped(batch):
    a, g = batch.draw()
    kfac = kfac_factors(a, g)
    tkfac = TKFAC.from_factors(TraceRestrictedFactors(1.0, kfac.A, kfac.G))
    assert_close(tkfac.dense(), KFAC.fit(a, g).dense())


# 5. TKFAC is one power step towards the nearest Kronecker product.


@given(batches(positions=False))
def test_the_rearranged_block_times_the_identity_gives_tkfacs_factors(batch):
    a, g = batch.draw()
    F = fisher_by_loops(a, g)
    R = rearrange(F, batch.d_in, batch.d_out)
    assert np.array_equal(R, rearranged_by_loops(F, batch.d_in, batch.d_out))
    factors = trace_restricted_factors(a, g)
    left = unvec_by_loops(R @ vec_by_loops(np.eye(batch.d_out)), batch.d_in, batch.d_in)
    right = unvec_by_loops(R.T @ vec_by_loops(np.eye(batch.d_in)), batch.d_out, batch.d_out)
    assert_close(factors.delta * factors.Phi, left)
    assert_close(factors.delta * factors.Psi, right)


@given(batches(positions=False))
def test_tkfacs_factors_are_shampoos(batch):
    a, g = batch.draw()
    G = gradients_by_loops(a, g)
    left = sum(G_n.T @ G_n for vectors in G for G_n in vectors) / batch.N
    right = sum(G_n @ G_n.T for vectors in G for G_n in vectors) / batch.N
    factors = trace_restricted_factors(a, g)
    assert_close(factors.delta * factors.Phi, left)
    assert_close(factors.delta * factors.Psi, right)


@given(batches(positions=False, scales=False, min_N=2))
def test_power_steps_go_from_tkfac_to_the_optimum(batch):
    a, g = batch.draw()
    F = fisher_by_loops(a, g)
    norm = np.linalg.norm(F)
    sizes = batch.d_in, batch.d_out
    tkfac = TKFAC.fit(a, g).dense()
    first = np.kron(*kronecker_power_iteration(F, *sizes, steps=1))
    assert_close(first * np.trace(F) / np.trace(first), tkfac)
    optimum = np.kron(*nearest_kronecker_product(F, *sizes))
    errors = [np.linalg.norm(F - tkfac) / norm]
    for steps in (1, 2, 4, 8, 200):
        product = np.kron(*kronecker_power_iteration(F, *sizes, steps=steps))
        errors.append(np.linalg.norm(F - product) / norm)
    assert (np.diff(errors) <= 1e-13).all()
    singular = np.linalg.svd(rearranged_by_loops(F, *sizes), compute_uv=False)
    second = singular[1] if len(singular) > 1 else 0.0
    assert errors[-1] >= np.linalg.norm(F - optimum) / norm - 1e-13
    if second < 0.8 * singular[0]:  # 0.8^200 < 1e-19
        assert_close(product, optimum, rtol=1e-10)
