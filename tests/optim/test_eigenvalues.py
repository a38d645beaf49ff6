"""If this fails, D is not the Fisher block's diagonal in the basis, or not that of the factors."""

import numpy as np
import pytest
import torch

from tekfac_edu.optim.eigenvalues import (
    FactorEigenvalues,
    corrected_eigenvalues,
    eigenvalues_of_gradients,
    move_eigenvalues,
    projecting_first_is_cheaper,
)
from tekfac_edu.optim.factors import layer_format

from . import oracles
from .networks import gaussian, orthogonal
from .oracles import assert_close, vec

# T = 1; projected first (T < S d_out), formed first
SHAPES = {
    "no positions": ((7, 4), (7, 3)),
    "no positions, two vectors": ((7, 4), (2, 7, 3)),
    "two positions": ((5, 2, 4), (5, 2, 3)),
    "eight positions": ((5, 8, 4), (5, 8, 3)),
    "eight positions, three vectors": ((5, 8, 4), (3, 5, 8, 3)),
    "eight positions, two vectors": ((5, 8, 4), (2, 5, 8, 3)),
}
every_shape = pytest.mark.parametrize("shape", SHAPES)
columns = pytest.mark.parametrize("k", [4, 2])


def rows_gradients_and_basis(shape, k=4):
    a, g = (gaussian(*sizes, seed=seed) for seed, sizes in enumerate(SHAPES[shape]))
    in_layer_format = layer_format(a, g)
    G = np.einsum("snto,nti->snoi", in_layer_format[1].numpy(), in_layer_format[0].numpy())
    return a, g, G, orthogonal(4, seed=2)[:, :k], orthogonal(3, seed=3)


@columns
@every_shape
def test_corrected_eigenvalues_are_second_moments_of_each_example_s_gradient(shape, k):
    a, g, G, Q_in, Q_out = rows_gradients_and_basis(shape, k)
    expected = oracles.second_moments(G, Q_in.numpy(), Q_out.numpy())
    assert_close(corrected_eigenvalues(a, g, Q_in, Q_out), expected, rtol=1e-12)
    found = eigenvalues_of_gradients(torch.tensor(G), Q_in, Q_out)
    assert_close(found, expected, rtol=1e-12)


@every_shape
def test_they_are_the_diagonal_of_the_fisher_block_and_sum_to_its_trace(shape):
    a, g, G, Q_in, Q_out = rows_gradients_and_basis(shape)
    F, Q = oracles.fisher_block(G), np.kron(Q_in, Q_out)
    D = corrected_eigenvalues(a, g, Q_in, Q_out)
    assert_close(vec(D.numpy()), np.diag(Q.T @ F @ Q), rtol=1e-12)
    assert_close(D.sum(), np.trace(F), rtol=1e-12)


def test_the_cheaper_order_is_the_one_of_fewer_multiplications():
    for T, d_out, S in np.ndindex(40, 12, 4):
        T, d_out, S, d_in = T + 1, d_out + 1, S + 1, 1000
        project = T * d_in**2 + S * T * d_out**2 + S * T * d_in * d_out
        form = S * (T * d_out**2 + T * d_in * d_out + d_out * d_in**2)
        assert projecting_first_is_cheaper(T, d_out, S) == (project < form)


def dense(D, Q_in, Q_out):
    Q = np.kron(Q_in, Q_out)
    return (Q * vec(np.asarray(D))) @ Q.T


def test_moved_eigenvalues_are_the_diagonal_of_what_they_stood_for():
    D = gaussian(3, 4).square()
    old, new = ((orthogonal(4, seed=s), orthogonal(3, seed=s + 1)) for s in (1, 5))
    Q = np.kron(*new)
    expected = np.diag(Q.T @ dense(D, *old) @ Q)
    found = move_eigenvalues(D, *old, *new)
    assert_close(vec(found.numpy()), expected, rtol=1e-12)
    assert_close(found.sum(), D.sum(), rtol=1e-13)
    assert found.min() >= 0


def test_moving_to_the_same_eigenvectors_in_another_order_moves_nothing_else():
    D, Q_in, Q_out = gaussian(3, 4).square(), orthogonal(4), orthogonal(3, seed=1)
    found = move_eigenvalues(D, Q_in, Q_out, -Q_in[:, [2, 0, 3, 1]], Q_out)
    assert_close(found, D[:, [2, 0, 3, 1]], rtol=1e-12)


def test_blocks_are_moved_each_by_itself():
    D, old, new = gaussian(2, 3, 4).square(), (orthogonal(2, 4), orthogonal(2, 3)), ()
    new = orthogonal(2, 4, seed=5), orthogonal(2, 3, seed=6)
    together = move_eigenvalues(D, *old, *new)
    for b in range(2):
        alone = move_eigenvalues(D[b], *(Q[b] for Q in (*old, *new)))
        assert_close(together[b], alone, rtol=1e-13)


@pytest.mark.parametrize("blocks", [(), (2,)], ids=["one", "blocks"])
def test_eigenvalues_of_factors_are_products_with_whatever_is_added_to_either_side(blocks):
    s_in, s_out = gaussian(*blocks, 4).square(), gaussian(*blocks, 3, seed=1).square()
    add_in, add_out = gaussian(*blocks, seed=2).square(), gaussian(*blocks, seed=3).square()
    eigenvalues = FactorEigenvalues(s_in, s_out, s_in.mean(-1), s_out.mean(-1))
    D, damped = eigenvalues.D, eigenvalues.plus(add_in, add_out)
    for block in np.ndindex(*blocks):
        assert_close(D[block], np.outer(s_out[block], s_in[block]), rtol=1e-14)
        sides = s_out[block] + add_out[block], s_in[block] + add_in[block]
        assert_close(damped[block], np.outer(*sides), rtol=1e-14)
        assert_close(
            eigenvalues.plus(0.5, 2.0)[block], np.outer(s_out[block] + 2, s_in[block] + 0.5)
        )
