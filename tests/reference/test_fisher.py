"""If this fails, the book's exact Fisher is not the metric that the KL divergence gives."""

from itertools import pairwise

import numpy as np
import pytest

from tekfac_edu.reference import (
    MLP,
    LayerStatistics,
    exact_fisher,
    fisher_block,
    fisher_matrix,
    to_row_order,
)

from .oracles import (
    BATCHES,
    Batch,
    assert_close,
    fisher_by_loops,
    gradients_by_loops,
    vec_by_loops,
)

torch = pytest.importorskip("torch")

from .autograd_oracles import (  # noqa: E402
    data,
    every_activation,
    every_loss,
    network,
    probabilities,
    torch_forward,
)

SMALL = (2, 3, 3, 3)


def small_network(activation, seed=0):
    return network(activation, seed, SMALL)


def small_data(loss, N=5):
    return data(loss, N=N, d=2, C=3)


def split(theta):
    """One vector, every layer's weights with columns stacked, to weight matrices."""
    weights, start = [], 0
    for d_in, d_out in pairwise(SMALL):
        stop = start + d_out * (d_in + 1)
        weights.append(theta[start:stop].reshape(d_in + 1, d_out).T)
        start = stop
    return weights


def joined(mlp):
    return torch.tensor(np.concatenate([vec_by_loops(W) for W in mlp.weights]))


def gauss_newton(mlp, x, activation, loss):
    """(1/N) Σ_n J_nᵀ H_n J_n by autograd."""

    def outputs(theta):
        return torch_forward(split(theta), x, activation)[0]

    theta = joined(mlp)
    J = torch.func.jacrev(outputs)(theta).numpy()
    z = outputs(theta).numpy()
    F = 0.0
    for n in range(len(x)):
        H = np.eye(z.shape[1])
        if loss == "cross_entropy":
            p = np.exp(z[n] - z[n].max())
            p /= p.sum()
            H = np.diag(p) - np.outer(p, p)
        F = F + J[n].T @ H @ J[n] / len(x)
    return F


@pytest.mark.parametrize("batch", BATCHES, ids=lambda b: b.name)
def test_block_by_loops(batch):
    a, g = batch.draw()
    assert_close(fisher_block(a, g), fisher_by_loops(a, g))


def test_block_of_one_example_is_the_outer_product_of_its_gradient():
    a, g = np.array([[1.0, 2.0]]), np.array([[3.0, 5.0, 7.0]])
    v = np.array([3.0, 5.0, 7.0, 6.0, 10.0, 14.0])
    assert np.array_equal(fisher_block(a, g), np.outer(v, v))


def test_block_is_a_mean_and_not_a_sum():
    a, g = Batch("", 6, 4, 3).draw()
    twice = fisher_block(np.vstack([a, a]), np.vstack([g, g]))
    assert_close(twice, fisher_block(a, g), rtol=1e-14)


def test_forgetting_that_autograd_divides_by_the_batch_costs_a_square():
    a, g = Batch("", 6, 4, 3).draw()
    assert_close(fisher_block(a, g / 6), fisher_block(a, g) / 36, rtol=1e-14)


def test_vectors_of_an_example_are_summed():
    a, g = Batch("", 6, 4, 3, S=3).draw()
    assert_close(fisher_block(a, g), sum(fisher_block(a, g_s) for g_s in g), rtol=1e-13)


def test_positions_are_one_example():
    a, g = Batch("", 5, 3, 2, T=4).draw()
    G = sum(g[:, t, :, None] * a[:, t, None, :] for t in range(4))
    v = G.transpose(0, 2, 1).reshape(5, -1)
    assert_close(fisher_block(a, g), v.T @ v / 5)


@pytest.mark.parametrize("order", ["F", "strided", "float32"])
def test_layout_and_dtype_do_not_matter(order):
    a, g = (x.astype(np.float32).astype(np.float64) for x in Batch("", 5, 3, 2, 3, 2).draw())
    change = {
        "F": np.asfortranarray,
        "strided": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
        "float32": lambda x: x.astype(np.float32),
    }[order]
    assert_close(fisher_block(change(a), change(g)), fisher_block(a, g), rtol=1e-14)


@every_activation
@every_loss
def test_exact_fisher_is_the_gauss_newton_matrix(activation, loss):
    mlp, (x, _) = small_network(activation), small_data(loss)
    F = exact_fisher(mlp, x, loss=loss)
    assert_close(F, gauss_newton(mlp, x, activation, loss), rtol=1e-11)
    assert np.abs(F[:9, 9:]).max() > 1e-3 * np.abs(F).max()


def test_exact_fisher_is_the_hessian_of_the_kl_divergence():
    mlp, (x, _) = small_network("tanh"), small_data("cross_entropy")
    theta = joined(mlp)
    log_p = torch.log_softmax(torch_forward(split(theta), x, "tanh")[0], 1)

    def divergence(moved):
        log_q = torch.log_softmax(torch_forward(split(moved), x, "tanh")[0], 1)
        return (log_p.exp() * (log_p - log_q)).sum(1).mean()

    hessian = torch.func.hessian(divergence)(theta).numpy()
    assert_close(exact_fisher(mlp, x), hessian, rtol=1e-10)


def test_exact_fisher_of_squared_error_is_the_hessian_of_the_gaussian_divergence():
    mlp, (x, _) = small_network("sigmoid"), small_data("squared_error")
    theta = joined(mlp)
    z = torch_forward(split(theta), x, "sigmoid")[0]

    def divergence(moved):
        return 0.5 * ((torch_forward(split(moved), x, "sigmoid")[0] - z) ** 2).sum(1).mean()

    hessian = torch.func.hessian(divergence)(theta).numpy()
    assert_close(exact_fisher(mlp, x, loss="squared_error"), hessian, rtol=1e-10)


@every_activation
@every_loss
def test_every_blocks_place_in_the_full_matrix(activation, loss):
    mlp, (x, y) = small_network(activation), small_data(loss)
    for fisher in ("exact", "mc", "empirical"):
        statistics = mlp.layer_statistics(
            x, y, fisher=fisher, loss=loss, rng=np.random.default_rng(0), num_samples=2
        )
        F = fisher_matrix(statistics)
        sizes = [W.size for W in mlp.weights]
        ends = np.cumsum(sizes)
        assert F.shape == (ends[-1], ends[-1])
        vectors = [gradients_by_loops(layer.a, layer.g) for layer in statistics]
        for i, k in np.ndindex(len(sizes), len(sizes)):
            expected = sum(
                np.outer(vec_by_loops(left), vec_by_loops(right))
                for G, H in zip(vectors[i], vectors[k], strict=True)
                for left, right in zip(G, H, strict=True)
            ) / len(x)
            rows, columns = (slice(ends[m] - sizes[m], ends[m]) for m in (i, k))
            assert_close(F[rows, columns], expected)
        for i, layer in enumerate(statistics):
            own = slice(ends[i] - sizes[i], ends[i])
            assert_close(fisher_block(layer.a, layer.g), F[own, own])


@every_loss
def test_exact_fisher_is_the_matrix_of_the_exact_statistics(loss):
    mlp, (x, _) = small_network("tanh"), small_data(loss)
    statistics = mlp.layer_statistics(x, fisher="exact", loss=loss)
    assert_close(exact_fisher(mlp, x, loss=loss), fisher_matrix(statistics))


def test_one_layers_matrix_in_row_order_is_what_torch_flattens():
    mlp, (x, y) = network("tanh", widths=(3, 2)), data("cross_entropy")
    layer = mlp.layer_statistics(x, y, fisher="empirical")[0]
    W = torch.tensor(mlp.weights[0], requires_grad=True)
    rows = []
    for n in range(len(x)):
        z = torch_forward([W], x[n : n + 1], "tanh")[0]
        own = torch.nn.functional.cross_entropy(z, torch.as_tensor(y[n : n + 1]))
        rows.append(torch.autograd.grad(own, W)[0].flatten().numpy())
    expected = np.stack(rows).T @ np.stack(rows) / len(x)
    assert_close(to_row_order(fisher_block(layer.a, layer.g), 4, 2), expected)


def test_repeating_every_example_changes_no_fisher():
    mlp, (x, y) = small_network("tanh"), small_data("cross_entropy")
    doubled = np.vstack([x, x]), np.concatenate([y, y])
    assert_close(exact_fisher(mlp, doubled[0]), exact_fisher(mlp, x), rtol=1e-13)
    once = fisher_matrix(mlp.layer_statistics(x, y, fisher="empirical"))
    twice = fisher_matrix(mlp.layer_statistics(*doubled, fisher="empirical"))
    assert_close(twice, once, rtol=1e-13)


def test_the_empirical_fisher_is_another_matrix():
    mlp, (x, y) = small_network("tanh"), small_data("cross_entropy")
    exact = exact_fisher(mlp, x)
    empirical = fisher_matrix(mlp.layer_statistics(x, y, fisher="empirical"))
    assert np.linalg.norm(empirical - exact) > 0.1 * np.linalg.norm(exact)


def sampling_variance(mlp, x, activation):
    """V with E‖F_mc − F‖² = V/M: (1/N²) Σ_n (Σ_c p_c‖v_nc‖⁴ − ‖Σ_c p_c v_nc v_ncᵀ‖²)."""
    p = probabilities(mlp, x, activation)
    statistics = mlp.layer_statistics(x, fisher="exact")
    scaled = [gradients_by_loops(layer.a, layer.g) for layer in statistics]
    V = 0.0
    for n in range(len(x)):
        vectors = [np.concatenate([vec_by_loops(G[c, n]) for G in scaled]) for c in range(3)]
        second = sum(np.outer(v, v) for v in vectors)
        fourth = sum((v @ v) ** 2 / p[n, c] for c, v in enumerate(vectors))
        V += (fourth - np.sum(second**2)) / len(x) ** 2
    return V


@pytest.mark.parametrize("M", [1, 4, 16])
def test_sampled_fisher_comes_to_the_exact_one_as_the_root_of_the_samples(M):
    mlp, (x, _) = small_network("tanh"), small_data("cross_entropy")
    exact = exact_fisher(mlp, x)
    rng = np.random.default_rng(M)
    repeats = 300
    squares, mean = [], 0.0
    for _ in range(repeats):
        sampled = fisher_matrix(mlp.layer_statistics(x, fisher="mc", rng=rng, num_samples=M))
        squares.append(np.sum((sampled - exact) ** 2))
        mean = mean + sampled / repeats
    V = sampling_variance(mlp, x, "tanh")
    # a mean of `repeats` draws, five standard errors of it
    error = 5 * np.std(squares) / np.sqrt(repeats)
    assert error < 0.5 * V / M, "the test would hardly notice a factor of two"
    assert abs(np.mean(squares) - V / M) < error
    # and no bias: the mean of all draws has variance V/(M·repeats); Markov at 1/25
    assert np.sum((mean - exact) ** 2) < 25 * V / (M * repeats)


def test_sampled_fisher_of_squared_error_comes_to_the_exact_one():
    mlp, (x, _) = small_network("tanh"), small_data("squared_error")
    exact = exact_fisher(mlp, x, loss="squared_error")
    errors = []
    for M in (100, 10_000):
        statistics = mlp.layer_statistics(
            x, fisher="mc", loss="squared_error", rng=np.random.default_rng(M), num_samples=M
        )
        errors.append(np.linalg.norm(fisher_matrix(statistics) - exact))
    # both are norms of many nearly Gaussian entries: each within a factor 3 of its size
    assert errors[1] < errors[0] * 3 / np.sqrt(100)
    assert errors[1] < 0.1 * np.linalg.norm(exact)


def test_statistics_of_ones_own_making():
    a, g = Batch("", 5, 3, 2).draw()
    b, h = Batch("", 5, 2, 4, seed=1).draw()
    F = fisher_matrix([LayerStatistics(a, g), LayerStatistics(b, h)])
    rows = np.stack([np.concatenate([np.kron(a[n], g[n]), np.kron(b[n], h[n])]) for n in range(5)])
    assert_close(F, rows.T @ rows / 5)


def test_a_mean_does_not_lose_the_bias():
    mlp = MLP((2, 3), rng=0)
    x = np.zeros((4, 2))
    F = exact_fisher(mlp, x, loss="squared_error")
    expected = np.zeros((9, 9))
    expected[6:, 6:] = np.eye(3)
    assert_close(F, expected, rtol=1e-15)
