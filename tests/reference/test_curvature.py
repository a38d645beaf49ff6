"""If this fails, a layer remembers another past than it is told to, or in a basis it has left."""

import numpy as np
import pytest

from tekfac_edu.reference import EKFAC, KFAC, TEKFAC, TKFAC, LayerCurvature, averaged

from .methods import every_method
from .oracles import Batch, DenseLayer, assert_close

SHAPES = {
    "plain": Batch("", 6, 4, 3),
    "positions": Batch("", 5, 3, 4, T=3),
    "vectors and positions": Batch("", 4, 3, 2, T=3, S=2),
}


def stream(shape, steps=6):
    for k in range(steps):
        a, g = SHAPES[shape].draw()
        rng = np.random.default_rng(k)
        yield (1 + 0.5 * k) * a, g + 0.3 * rng.normal(size=g.shape)


@every_method
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("interval", [(1, 1, 1), (2, 3, 1), (1, 2, 3)])
def test_what_a_layer_remembers_is_what_dense_matrices_do(method, shape, interval):
    curvature = LayerCurvature(method, decay=0.8)
    expected = DenseLayer(method.__name__.lower(), interval, 0.8)
    for k, (a, g) in enumerate(stream(shape)):
        due_factors, due_basis, due_eigenvalues = (k % steps == 0 for steps in interval)
        if due_factors:
            curvature.average_factors(a, g)
        if due_basis:
            curvature.turn_to(curvature.factors)
        if due_eigenvalues:
            curvature.average_eigenvalues(a, g)
        expected.update(k, a, g)
        dense = curvature.approximation.dense
        # each step passes its rounding on: six of them
        assert_close(dense(), expected.undamped(), rtol=1e-11)
        assert_close(dense(0.1), expected.damped(0.1), rtol=1e-11)


@pytest.mark.parametrize("method", [EKFAC, TEKFAC])
def test_by_qr_the_basis_is_another_and_the_average_moves_with_it_all_the_same(method):
    curvature = LayerCurvature(method, decay=0.8, basis="qr")
    expected = DenseLayer(method.__name__.lower(), decay=0.8, basis="qr")
    for k, (a, g) in enumerate(stream("plain")):
        curvature.average_factors(a, g)
        curvature.turn_to(curvature.factors)
        curvature.average_eigenvalues(a, g)
        expected.update(k, a, g)
        assert_close(curvature.approximation.dense(), expected.undamped(), rtol=1e-11)
    fresh = method.from_factors(curvature.factors)
    assert np.abs(np.abs(curvature.approximation.Q_in.T @ fresh.Q_in) - np.eye(4)).max() > 1e-6


@every_method
def test_the_first_batch_replaces(method):
    (a, g), (other_a, other_g) = stream("plain", steps=2)
    curvature = LayerCurvature(method, decay=0.9)
    curvature.average_factors(a, g)
    curvature.turn_to(curvature.factors)
    curvature.average_eigenvalues(a, g)
    assert np.array_equal(curvature.approximation.dense(0.1), method.fit(a, g).dense(0.1))
    curvature.average_factors(other_a, other_g)
    expected = averaged(method.factors(a, g), method.factors(other_a, other_g), 0.9)
    assert np.array_equal(curvature.factors.S_in, expected.S_in)
    assert curvature.factors.scale == expected.scale


@pytest.mark.parametrize("method", [EKFAC, TEKFAC])
def test_until_some_are_measured_the_factors_own_eigenvalues_stand_in(method):
    a, g = SHAPES["plain"].draw()
    plain = {EKFAC: KFAC, TEKFAC: TKFAC}[method].fit(a, g)
    assert_close(method.from_factors(method.factors(a, g)).dense(), plain.dense())


@pytest.mark.parametrize("method", [KFAC, TKFAC])
def test_a_plain_methods_eigenvalues_are_not_measured(method):
    (a, g), (other_a, other_g) = stream("plain", steps=2)
    fitted = method.fit(a, g)
    assert fitted.measured(other_a, other_g) is fitted


@every_method
def test_a_layer_with_positions_is_a_convolution(method):
    for shape, batch in SHAPES.items():
        curvature = LayerCurvature(method)
        curvature.average_factors(*batch.draw())
        assert curvature.is_convolution == ("positions" in shape)
