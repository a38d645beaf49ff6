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
    Added,
    ByTrace,
    KFACFactors,
    Paper,
    TraceRestrictedFactors,
    kfac_damping,
    kfac_pi,
    precondition,
)

from .oracles import (
    Batch,
    assert_close,
    batches,
    fisher_by_loops,
    random_semidefinite,
    solve_dense,
)

dampings = st.floats(1e-3, 1e3)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 999))
def test_pi_is_the_root_of_the_ratio_of_mean_eigenvalues(d_in, d_out, seed):
    rng = np.random.default_rng(seed)
    A, G = random_semidefinite(rng, d_in), 1e-3 * random_semidefinite(rng, d_out)
    mean_A, mean_G = np.linalg.eigvalsh(A).mean(), np.linalg.eigvalsh(G).mean()
    pi = kfac_pi(np.trace(A) / d_in, np.trace(G) / d_out)
    assert pi == pytest.approx(np.sqrt(mean_A / mean_G), rel=1e-12)


@pytest.mark.parametrize(("size_A", "size_G"), [(1e24, 1e-60), (1e-60, 1e24), (1e-60, 1e-60)])
def test_pi_of_extreme_factors(size_A, size_G):
    pi = kfac_pi(size_A, size_G)
    assert pi == pytest.approx(np.sqrt(size_A) / np.sqrt(size_G), rel=1e-12)


@pytest.mark.parametrize("means", [(0.0, 2.0), (2.0, 0.0), (0.0, 0.0)])
def test_pi_is_one_where_a_factor_is_zero(means):
    assert kfac_pi(*means) == 1.0


def test_kfac_damping_is_the_root_of_the_damping_split_by_pi():
    # π = √(8/2) = 2, √λ = 3
    assert kfac_damping(8.0, 2.0, 9.0) == pytest.approx((6.0, 1.5), rel=1e-15)


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


class Layer:
    """What a rule asks of a layer, without a loop around it."""

    def __init__(self, method, batch):
        self.a, self.g = batch.draw()
        self.approximation = method.fit(self.a, self.g)
        self.is_convolution = self.a.ndim == 3


CONVOLUTION, OTHER = Batch("", 6, 4, 3, T=3), Batch("", 5, 3, 2, T=2, S=2, scale_g=0.1, seed=1)
DENSE = Batch("", 8, 3, 4, scale_a=2.0, seed=2)
every_method = pytest.mark.parametrize("method", [KFAC, EKFAC, TKFAC, TEKFAC])


@every_method
@pytest.mark.parametrize("batch", [CONVOLUTION, DENSE])
def test_the_papers_rule_is_what_dense_shows(method, batch):
    layer, rule = Layer(method, batch), Paper(0.3)
    assert rule.layer_dampings([layer, layer]) == [0.3, 0.3]
    assert_solves(layer.approximation, rule.damped(layer.approximation, 0.3), 0.3)


def assert_solves(approximation, D_damped, damping):
    """To divide by D_damped in the basis is to solve with `dense(damping)`."""
    M = np.random.default_rng(0).normal(size=D_damped.shape)
    step = precondition(M, approximation.Q_in, approximation.Q_out, D_damped)
    assert_close(step, solve_dense(approximation.dense(damping), M), rtol=1e-9)


@every_method
@pytest.mark.parametrize("batch", [CONVOLUTION, DENSE])
def test_added_damping_is_tikhonov_for_every_method(method, batch):
    layer, rule = Layer(method, batch), Added(0.3)
    assert rule.layer_dampings([layer, layer]) == [0.3, 0.3]
    F = layer.approximation.dense() + 0.3 * np.eye(batch.d_in * batch.d_out)
    D_damped = rule.damped(layer.approximation, 0.3)
    M = np.random.default_rng(0).normal(size=D_damped.shape)
    step = precondition(M, layer.approximation.Q_in, layer.approximation.Q_out, D_damped)
    assert_close(step, solve_dense(F, M), rtol=1e-9)


@every_method
def test_by_trace_takes_the_mean_of_a_convolutions_spectrum(method):
    layers = [Layer(method, batch) for batch in (CONVOLUTION, DENSE, OTHER)]
    rule = ByTrace(0.05, multiplier=2.0, floor=0.0)
    means = [np.linalg.eigvalsh(layer.approximation.dense()).mean() for layer in layers]
    expected = [2 * means[0], 0.05 * 2 * max(means[0], means[2]), 2 * means[2]]
    assert means[0] > means[2], "the case is meant to tell the largest from the last"
    dampings = rule.layer_dampings(layers)
    assert dampings == pytest.approx(expected, rel=1e-12)
    for layer, damping in zip(layers, dampings, strict=True):
        assert_solves(layer.approximation, rule.damped(layer.approximation, damping), damping)


@pytest.mark.parametrize("method", [EKFAC, TEKFAC])
def test_by_trace_takes_the_mean_of_the_true_blocks_spectrum(method):
    layer = Layer(method, CONVOLUTION)
    mean = np.linalg.eigvalsh(fisher_by_loops(layer.a, layer.g)).mean()
    assert ByTrace(1.0, floor=0.0).layer_dampings([layer]) == pytest.approx([mean], rel=1e-12)


def test_by_trace_is_the_plain_rule_where_there_is_no_convolution():
    layers = [Layer(TEKFAC, DENSE), Layer(TEKFAC, DENSE)]
    assert ByTrace(0.05, multiplier=7.0).layer_dampings(layers) == [0.05, 0.05]


@pytest.mark.parametrize(
    ("trace", "dim", "floor", "expected"),
    [(12.0, 6, 1e-3, 2.0), (1e-60, 6, 3.0, 0.5), (1e-60, 4, 0.0, 2.5e-61), (1e24, 2, 1.0, 5e23)],
)
def test_by_trace_has_a_floor(trace, dim, floor, expected):
    layer = Layer(TEKFAC, CONVOLUTION)
    layer.approximation = TEKFAC(np.eye(dim), np.eye(1), np.full((1, dim), trace / dim))
    found = ByTrace(1.0, floor=floor).layer_dampings([layer])
    assert found == pytest.approx([expected], rel=1e-14, abs=0.0)


def test_the_papers_multiplier_is_one_and_the_floor_small():
    assert (ByTrace(0.1).multiplier, ByTrace(0.1).floor) == (1.0, 1e-8)
