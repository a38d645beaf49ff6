"""If this fails, the Kronecker factors are not the papers', nor is any method built on them."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tekfac_edu.reference import (
    KFAC,
    TEKFAC,
    TKFAC,
    KFACFactors,
    TraceRestrictedFactors,
    averaged,
    eigenbasis,
    kfac_factors,
    partial_traces,
    summed_factors,
    trace_restricted_factors,
)

from .oracles import (
    BATCHES,
    Batch,
    assert_close,
    batches,
    fisher_by_loops,
    kfac_factors_by_loops,
    trace_restricted_numerators_by_loops,
)

decays = st.floats(0.0, 1.0, exclude_max=True)


@pytest.mark.parametrize("batch", BATCHES, ids=lambda b: b.name)
def test_kfac_factors_by_loops(batch):
    a, g = batch.draw()
    factors = kfac_factors(a, g)
    A, G = kfac_factors_by_loops(a, g)
    assert_close(factors.A, A)
    assert_close(factors.G, G)


@pytest.mark.parametrize("batch", BATCHES, ids=lambda b: b.name)
def test_trace_restricted_factors_by_loops(batch):
    a, g = batch.draw()
    factors = trace_restricted_factors(a, g)
    delta, left, right = trace_restricted_numerators_by_loops(a, g)
    assert factors.delta == pytest.approx(delta, rel=1e-12, abs=0.0)
    assert_close(factors.Phi, left / delta)
    assert_close(factors.Psi, right / delta)


@given(batches())
def test_factors_are_symmetric_and_trace_one(batch):
    a, g = batch.draw()
    factors = trace_restricted_factors(a, g)
    assert np.trace(factors.Phi) == pytest.approx(1.0, rel=1e-12)
    assert np.trace(factors.Psi) == pytest.approx(1.0, rel=1e-12)
    for S in (factors.Phi, factors.Psi, *dataclasses.astuple(kfac_factors(a, g))):
        assert_close(S, S.T, rtol=1e-14)
        assert np.linalg.eigvalsh(S)[0] >= -1e-14 * np.trace(S)


@given(batches(positions=False))
def test_numerators_are_the_partial_traces_of_the_block(batch):
    a, g = batch.draw()
    factors = trace_restricted_factors(a, g)
    left, right = partial_traces(fisher_by_loops(a, g), batch.d_in, batch.d_out)
    assert_close(factors.delta * factors.Phi, left)
    assert_close(factors.delta * factors.Psi, right)


def test_no_gradient_at_all():
    factors = trace_restricted_factors(np.ones((3, 2)), np.zeros((3, 4)))
    assert factors.delta == 0.0
    assert np.array_equal(factors.Phi, np.eye(2) / 2)
    assert np.array_equal(factors.Psi, np.eye(4) / 4)
    assert np.array_equal(kfac_factors(np.ones((3, 2)), np.zeros((3, 4))).G, np.zeros((4, 4)))


def test_no_gradient_weighs_nothing_in_an_average():
    nothing = trace_restricted_factors(np.ones((3, 2)), np.zeros((3, 4)))
    factors = trace_restricted_factors(*Batch("", N=5, d_in=2, d_out=4).draw())
    for mean in (averaged(nothing, factors, 0.3), averaged(factors, nothing, 0.7)):
        assert mean.delta == pytest.approx(0.7 * factors.delta, rel=1e-14)
        assert_close(mean.Phi, factors.Phi, rtol=1e-14)
        assert_close(mean.Psi, factors.Psi, rtol=1e-14)
    still_nothing = averaged(nothing, nothing, 0.5)
    assert still_nothing.delta == 0.0
    assert np.array_equal(still_nothing.Phi, np.eye(2) / 2)


@pytest.mark.parametrize("shape", ["rows", "positions", "vectors"])
def test_layout_in_memory_does_not_matter(shape):
    sizes = {"rows": (None, None), "positions": (3, None), "vectors": (None, 2)}[shape]
    a, g = Batch("", 6, 4, 3, *sizes).draw()
    expected = dataclasses.astuple(trace_restricted_factors(a, g))
    strided = np.repeat(a, 2, axis=-1)[..., ::2], np.repeat(g, 2, axis=-1)[..., ::2]
    for a_other, g_other in ((np.asfortranarray(a), np.asfortranarray(g)), strided):
        actual = dataclasses.astuple(trace_restricted_factors(a_other, g_other))
        for x, y in zip(actual, expected, strict=True):
            assert_close(x, y, rtol=1e-14)


def test_float32_and_integers_are_taken_exactly():
    a, g = (x.astype(np.float32) for x in Batch("", 6, 4, 3).draw())
    small = trace_restricted_factors(a, g)
    large = trace_restricted_factors(a.astype(np.float64), g.astype(np.float64))
    assert small.Phi.dtype == small.Psi.dtype == np.float64
    assert small.delta == large.delta
    assert np.array_equal(small.Phi, large.Phi)
    counts = kfac_factors(np.array([[1, 2], [3, 4]]), np.array([[1], [-1]]))
    assert_close(counts.A, np.array([[5.0, 7.0], [7.0, 10.0]]), rtol=1e-15)
    assert_close(counts.G, np.array([[1.0]]), rtol=1e-15)


@pytest.mark.parametrize("batch", BATCHES, ids=lambda b: b.name)
@pytest.mark.parametrize("method", [KFAC, TKFAC])
def test_scale_and_sides_are_the_matrix_of_the_plain_method(method, batch):
    a, g = batch.draw()
    factors = method.factors(a, g)
    product = factors.scale * np.kron(factors.S_in, factors.S_out)
    assert_close(product, method.fit(a, g).dense())


def test_inputs_stay_as_they_were():
    a, g = Batch("", 6, 4, 3, 2, 3).draw()
    a_before, g_before = a.copy(), g.copy()
    kfac_factors(a, g), trace_restricted_factors(a, g)
    assert np.array_equal(a, a_before)
    assert np.array_equal(g, g_before)


def test_frozen():
    factors = kfac_factors(*Batch("", 6, 4, 3).draw())
    with pytest.raises(dataclasses.FrozenInstanceError):
        factors.A = np.eye(4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        trace_restricted_factors(*Batch("", 6, 4, 3).draw()).delta = 1.0


@given(st.integers(0, 999), decays, decays)
def test_running_averages_weigh_each_batch_by_its_age(seed, decay, later_decay):
    draws = [Batch("", 4, 3, 2, seed=seed + k).draw() for k in range(3)]
    weights = [decay * later_decay, (1 - decay) * later_decay, 1 - later_decay]

    kfac = kfac_factors(*draws[0])
    kfac = averaged(kfac, kfac_factors(*draws[1]), decay)
    kfac = averaged(kfac, kfac_factors(*draws[2]), later_decay)
    A, G = zip(*(kfac_factors_by_loops(*d) for d in draws), strict=True)
    assert_close(kfac.A, sum(w * x for w, x in zip(weights, A, strict=True)))
    assert_close(kfac.G, sum(w * x for w, x in zip(weights, G, strict=True)))

    mean = trace_restricted_factors(*draws[0])
    mean = averaged(mean, trace_restricted_factors(*draws[1]), decay)
    mean = averaged(mean, trace_restricted_factors(*draws[2]), later_decay)
    numerators = [trace_restricted_numerators_by_loops(*d) for d in draws]
    delta, left, right = (
        sum(w * x for w, x in zip(weights, each, strict=True))
        for each in zip(*numerators, strict=True)
    )
    assert mean.delta == pytest.approx(delta, rel=1e-12)
    assert_close(mean.delta * mean.Phi, left)
    assert_close(mean.delta * mean.Psi, right)


@given(st.integers(0, 999), st.floats(0.05, 0.95))
def test_averaged_numerators_keep_the_trace_and_both_partial_traces(seed, decay):
    old, new = Batch("", 4, 3, 2, seed=seed).draw(), Batch("", 5, 3, 2, seed=seed + 1).draw()
    F = decay * fisher_by_loops(*old) + (1 - decay) * fisher_by_loops(*new)
    mean = averaged(trace_restricted_factors(*old), trace_restricted_factors(*new), decay)
    assert TKFAC.from_factors(mean).trace() == pytest.approx(np.trace(F), rel=1e-12)
    left, right = partial_traces(TKFAC.from_factors(mean).dense(), 3, 2)
    left_F, right_F = partial_traces(F, 3, 2)
    assert_close(left, left_F)
    assert_close(right, right_F)


def test_averaged_ratios_do_not():
    old, new = Batch("", 4, 3, 2, seed=1).draw(), Batch("", 4, 3, 2, seed=2).draw()
    decay = 0.9
    F = decay * fisher_by_loops(*old) + (1 - decay) * fisher_by_loops(*new)
    first, second = trace_restricted_factors(*old), trace_restricted_factors(*new)

    def mean(x, y, weight=decay):
        return weight * x + (1 - weight) * y

    wrong = TraceRestrictedFactors(
        mean(first.delta, second.delta),
        mean(first.Phi, second.Phi),
        mean(first.Psi, second.Psi),
    )
    left = partial_traces(F, 3, 2)[0]
    assert np.linalg.norm(wrong.delta * wrong.Phi - left) > 1e-2 * np.linalg.norm(left)
    # the total trace does survive that mistake, as every Φ has trace 1; two decays break it
    assert wrong.delta == pytest.approx(np.trace(F), rel=1e-12)
    numerator = mean(first.delta * first.Phi, second.delta * second.Phi, weight=0.5)
    assert abs(np.trace(numerator / wrong.delta) - 1.0) > 1e-2


def test_given_factors_are_used_as_given():
    A, G = np.diag([1.0, 2.0]), np.array([[2.0, 1.0], [1.0, 3.0]])
    assert_close(KFAC.from_factors(KFACFactors(A, G)).dense(), np.kron(A, G))
    factors = TraceRestrictedFactors(5.0, A / 3, G / 5)
    assert_close(TKFAC.from_factors(factors).dense(), 5.0 * np.kron(A / 3, G / 5))


@pytest.mark.parametrize("batch", BATCHES, ids=lambda b: b.name)
def test_summed_factors_are_the_partial_traces_of_the_fisher_block(batch):
    """Of the true one, whose positions are summed before anything is squared."""
    a, g = batch.draw()
    factors, F = summed_factors(a, g), fisher_by_loops(a, g)
    left, right = partial_traces(F, a.shape[-1], g.shape[-1])
    assert factors.delta == pytest.approx(np.trace(F), rel=1e-12, abs=0.0)
    assert_close(factors.delta * factors.Phi, left)
    assert_close(factors.delta * factors.Psi, right)


def test_summed_factors_of_nothing_are_isotropic():
    factors = summed_factors(np.ones((3, 2, 2)), np.zeros((3, 2, 4)))
    assert factors.delta == 0
    assert_close(factors.Phi, np.eye(2) / 2)
    assert_close(factors.Psi, np.eye(4) / 4)


@pytest.mark.parametrize("method", [TKFAC, TEKFAC])
def test_a_method_is_built_on_the_factors_it_is_asked_for(method):
    a, g = Batch("", N=6, d_in=3, d_out=2, T=4).draw()
    apart, summed = method.fit(a, g), method.fit(a, g, "summed")
    assert_close(summed.Q_in, eigenbasis(summed_factors(a, g).Phi)[1])
    assert np.abs(summed.Q_in - apart.Q_in).max() > 1e-3
    with pytest.raises(ValueError, match="positions"):
        method.fit(a, g, "together")
