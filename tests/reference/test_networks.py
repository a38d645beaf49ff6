"""If this fails, the network's own backward pass is wrong, and every Fisher computed from it."""

import numpy as np
import pytest

from tekfac_edu.reference import MLP, LayerStatistics

from .oracles import assert_close, vec_by_loops

torch = pytest.importorskip("torch")

from .autograd_oracles import (  # noqa: E402
    WIDTHS,
    data,
    every_activation,
    every_loss,
    network,
    probabilities,
    pulled_back,
    torch_forward,
    torch_losses,
    torch_weights,
)


@every_activation
def test_forward(activation):
    mlp, (x, _) = network(activation), data("cross_entropy")
    z = torch_forward(torch_weights(mlp), x, activation)[0].detach().numpy()
    assert_close(mlp.forward(x), z, rtol=1e-14)


@every_activation
@every_loss
def test_loss_and_gradients_are_of_the_mean(activation, loss):
    mlp, (x, y) = network(activation), data(loss)
    weights = torch_weights(mlp)
    mean = torch_losses(torch_forward(weights, x, activation)[0], y, loss).mean()
    mean.backward()
    assert mlp.loss(x, y, loss=loss) == pytest.approx(mean.item(), rel=1e-13)
    for actual, W in zip(mlp.gradients(x, y, loss=loss), weights, strict=True):
        assert_close(actual, W.grad.numpy())


def test_squared_error_is_half_the_sum_over_outputs():
    mlp = MLP((1, 2), rng=0)
    mlp.weights[0][:] = [[1.0, 0.0], [0.0, 2.0]]
    # z = (3, 2), y = (0, 0): ½(9 + 4)
    assert mlp.loss(np.array([[3.0]]), np.zeros((1, 2)), loss="squared_error") == 6.5


@every_loss
def test_gradients_by_finite_differences_of_the_networks_own_loss(loss):
    mlp, (x, y) = network("tanh"), data(loss)
    step = 1e-6
    for W, gradient in zip(mlp.weights, mlp.gradients(x, y, loss=loss), strict=True):
        for place in np.ndindex(W.shape):
            kept = W[place]
            W[place] = kept + step
            above = mlp.loss(x, y, loss=loss)
            W[place] = kept - step
            below = mlp.loss(x, y, loss=loss)
            W[place] = kept
            # rounding 1e-16 / 1e-6, and the third derivative times 1e-12
            assert gradient[place] == pytest.approx((above - below) / (2 * step), abs=1e-8)


@every_activation
@every_loss
def test_inputs_of_every_layer_carry_a_one(activation, loss):
    mlp, (x, y) = network(activation), data(loss)
    expected = torch_forward(torch_weights(mlp), x, activation)[1]
    for fisher in ("exact", "mc", "empirical"):
        statistics = mlp.layer_statistics(
            x, y, fisher=fisher, loss=loss, rng=np.random.default_rng(0)
        )
        assert len(statistics) == len(mlp.weights)
        for layer, a in zip(statistics, expected, strict=True):
            assert isinstance(layer, LayerStatistics)
            assert_close(layer.a, a.detach().numpy(), rtol=1e-14)
            assert (layer.a[:, -1] == 1.0).all()


@every_activation
@every_loss
def test_empirical_vectors_are_each_examples_own_gradient(activation, loss):
    mlp, (x, y) = network(activation), data(loss)
    z, _, outputs = torch_forward(torch_weights(mlp), x, activation)
    expected = torch.autograd.grad(torch_losses(z, y, loss).sum(), outputs)
    for layer, g in zip(
        mlp.layer_statistics(x, y, fisher="empirical", loss=loss), expected, strict=True
    ):
        assert_close(layer.g, g.numpy())


@every_activation
def test_exact_vectors_of_cross_entropy(activation):
    mlp, (x, _) = network(activation), data("cross_entropy")
    p = probabilities(mlp, x, activation)
    for c in range(2):
        z, _, outputs = torch_forward(torch_weights(mlp), x, activation)
        own = torch_losses(z, np.full(len(x), c), "cross_entropy").sum()
        expected = torch.autograd.grad(own, outputs)
        for layer, g in zip(mlp.layer_statistics(x), expected, strict=True):
            assert layer.g.shape[0] == 2
            assert_close(layer.g[c], np.sqrt(p[:, [c]]) * g.numpy())


@every_activation
def test_exact_vectors_of_squared_error(activation):
    mlp, (x, _) = network(activation), data("squared_error")
    every_output = np.repeat(np.eye(2)[:, None, :], len(x), axis=1)
    expected = pulled_back(mlp, x, activation, every_output)
    actual = mlp.layer_statistics(x, fisher="exact", loss="squared_error")
    for layer, g in zip(actual, expected, strict=True):
        assert_close(layer.g, g)


@every_activation
@pytest.mark.parametrize("num_samples", [1, 4])
def test_sampled_labels_of_cross_entropy(activation, num_samples):
    mlp, (x, _) = network(activation), data("cross_entropy")
    p = probabilities(mlp, x, activation)
    statistics = mlp.layer_statistics(
        x, fisher="mc", rng=np.random.default_rng(0), num_samples=num_samples
    )
    top = statistics[-1].g * np.sqrt(num_samples)
    assert top.shape == (num_samples, len(x), 2)
    onehot = p - top
    assert np.abs(onehot - np.round(onehot)).max() < 1e-14
    assert np.array_equal(np.sort(np.round(onehot), axis=2)[..., -1], np.ones(top.shape[:2]))
    # every layer sends back the same labels
    expected = pulled_back(mlp, x, activation, statistics[-1].g)
    for layer, g in zip(statistics, expected, strict=True):
        assert_close(layer.g, g)


@every_activation
@pytest.mark.parametrize("num_samples", [1, 4])
def test_sampled_targets_of_squared_error(activation, num_samples):
    mlp, (x, _) = network(activation), data("squared_error")
    statistics = mlp.layer_statistics(
        x,
        fisher="mc",
        loss="squared_error",
        rng=np.random.default_rng(0),
        num_samples=num_samples,
    )
    expected = pulled_back(mlp, x, activation, statistics[-1].g)
    for layer, g in zip(statistics, expected, strict=True):
        assert layer.g.shape[:2] == (num_samples, len(x))
        assert_close(layer.g, g)


def test_sampled_noise_has_the_models_variance():
    mlp, (x, _) = network("tanh"), data("squared_error")
    M = 4000
    g = mlp.layer_statistics(
        x, fisher="mc", loss="squared_error", rng=np.random.default_rng(0), num_samples=M
    )[-1].g * np.sqrt(M)
    n = g.size
    # mean of n standard normals has deviation 1/√n, of their squares √(2/n): five of them
    assert abs(g.mean()) < 5 / np.sqrt(n)
    assert abs((g**2).mean() - 1) < 5 * np.sqrt(2 / n)
    assert abs((g[..., 0] * g[..., 1]).mean()) < 5 / np.sqrt(n / 2)


def test_sampled_labels_have_the_models_probabilities():
    mlp, (x, _) = network("tanh"), data("cross_entropy")
    p = probabilities(mlp, x, "tanh")
    M = 4000
    g = mlp.layer_statistics(x, fisher="mc", rng=np.random.default_rng(0), num_samples=M)[-1].g
    counts = np.round(p - g * np.sqrt(M)).mean(0)
    # a frequency's deviation is √(p(1-p)/M): five of them
    assert (np.abs(counts - p) < 5 * np.sqrt(p * (1 - p) / M)).all()


def test_samples_come_from_the_generator_that_is_given():
    mlp, (x, _) = network("tanh"), data("cross_entropy")

    def draw(seed):
        return mlp.layer_statistics(x, fisher="mc", rng=np.random.default_rng(seed))[-1].g

    assert np.array_equal(draw(0), draw(0))
    assert not all(np.array_equal(draw(0), draw(seed)) for seed in range(1, 5))


@every_loss
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_an_examples_vectors_do_not_depend_on_its_batch(fisher, loss):
    mlp, (x, y) = network("tanh"), data(loss)
    together = mlp.layer_statistics(x, y, fisher=fisher, loss=loss)
    for n in range(len(x)):
        own = slice(n, n + 1)
        alone = mlp.layer_statistics(x[own], y[own], fisher=fisher, loss=loss)
        for layer, single in zip(together, alone, strict=True):
            assert_close(layer.a[own], single.a, rtol=1e-13)
            assert_close(layer.g[..., own, :], single.g, rtol=1e-13)


@every_loss
def test_gradients_are_the_mean_of_the_empirical_vectors(loss):
    mlp, (x, y) = network("tanh"), data(loss)
    statistics = mlp.layer_statistics(x, y, fisher="empirical", loss=loss)
    for layer, gradient in zip(statistics, mlp.gradients(x, y, loss=loss), strict=True):
        mean = sum(np.outer(g, a) for g, a in zip(layer.g, layer.a, strict=True)) / len(x)
        assert_close(gradient, mean)


def test_logits_of_a_thousand_do_not_overflow():
    mlp = MLP((1, 3), rng=0)
    mlp.weights[0][:] = [[1000.0, 0.0], [-1000.0, 0.0], [0.0, 0.0]]
    x = np.array([[1.0], [-1.0], [2.0]])
    y = np.array([1, 0, 0])
    # -log p: 2000 where the wrong class is sure, 0 where the right one is
    assert mlp.loss(x, y) == pytest.approx((2000 + 2000 + 0) / 3, rel=1e-14)
    for fisher in ("exact", "empirical", "mc"):
        g = mlp.layer_statistics(x, y, fisher=fisher, rng=np.random.default_rng(0))[0].g
        assert np.isfinite(g).all()
    assert np.isfinite(mlp.gradients(x, y)[0]).all()


def test_shapes_and_seeds():
    mlp = MLP(WIDTHS, rng=3)
    assert [W.shape for W in mlp.weights] == [(5, 4), (4, 6), (2, 5)]
    assert all(W.dtype == np.float64 for W in mlp.weights)
    same, other = MLP(WIDTHS, rng=np.random.default_rng(3)), MLP(WIDTHS, rng=4)
    for W, V, U in zip(mlp.weights, same.weights, other.weights, strict=True):
        assert np.array_equal(W, V)
        assert not np.array_equal(W, U)


def test_changing_the_weights_changes_the_network():
    mlp, (x, _) = network("tanh"), data("cross_entropy")
    before = mlp.forward(x)
    mlp.weights[-1][:, -1] += 1.0
    assert_close(mlp.forward(x), before + 1.0, rtol=1e-13)
    mlp.weights = [np.zeros_like(W) for W in mlp.weights]
    assert np.array_equal(mlp.forward(x), np.zeros_like(before))


def test_float32_input_gives_float64_statistics():
    mlp, (x, _) = network("tanh"), data("cross_entropy")
    x = x.astype(np.float32)
    exact = mlp.layer_statistics(x.astype(np.float64))
    for layer, expected in zip(mlp.layer_statistics(x), exact, strict=True):
        assert layer.g.dtype == np.float64
        assert np.array_equal(layer.g, expected.g)


def test_vectors_and_weights_are_in_the_same_order():
    """The gradient of weight (i, j) is g_i a_j: rows are outputs, columns inputs."""
    mlp, (x, y) = network("relu"), data("cross_entropy")
    layer = mlp.layer_statistics(x[:1], y[:1], fisher="empirical")[0]
    gradient = mlp.gradients(x[:1], y[:1])[0]
    assert_close(vec_by_loops(gradient), np.kron(layer.a[0], layer.g[0]))
