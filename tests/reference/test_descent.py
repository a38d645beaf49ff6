"""If this fails, training steps by stale or wrongly ordered statistics; its curves mislead."""

import numpy as np
import pytest

from tekfac_edu.reference import (
    KFAC,
    MLP,
    Added,
    ByTrace,
    ConvNet,
    GradientDescent,
    NaturalGradient,
    Paper,
    train,
)

from .oracles import (
    DenseLayer,
    assert_close,
    corrected_eigenvalues_by_loops,
    solve_dense,
    vec_by_loops,
)

WIDTHS = (3, 4, 2)
METHODS = ["kfac", "ekfac", "tkfac", "tekfac"]
MEASURED = ["ekfac", "tekfac"]
every_method = pytest.mark.parametrize("method", METHODS)


def stream(steps, N=6):
    """Batches whose scale drifts, so that an old statistic is not like a new one."""
    rng = np.random.default_rng(0)
    for k in range(steps):
        yield (1 + 0.5 * k) * rng.normal(size=(N, 3)), rng.integers(2, size=N)


def compare(method, steps=7, lr=0.1, damping=0.05, momentum=0.0, lr_scale="natural", **chosen):
    """Run the package and the dense loop side by side; their weights must stay together."""
    settings = {"interval": (1, 1, 1), "decay": 0.8, "basis": "eigh", **chosen}
    mlp, expected = MLP(WIDTHS, rng=1), MLP(WIDTHS, rng=1)
    optimizer = NaturalGradient(
        mlp,
        method,
        lr,
        damping,
        momentum=momentum,
        fisher="exact",
        lr_scale=lr_scale,
        **settings,
    )
    layers = [DenseLayer(method, **settings) for _ in expected.weights]
    velocity = [np.zeros_like(W) for W in expected.weights]
    for k, (x, y) in enumerate(stream(steps)):
        statistics = expected.layer_statistics(x, fisher="exact")
        gradients = expected.gradients(x, y)
        loss = expected.loss(x, y)
        for i, layer in enumerate(layers):
            layer.update(k, statistics[i].a, statistics[i].g)
            direction = solve_dense(layer.damped(damping), gradients[i])
            if lr_scale == "sgd":
                direction = damping * direction
            velocity[i] = momentum * velocity[i] + direction
            expected.weights[i] -= lr * velocity[i]
        assert optimizer.step(x, y) == pytest.approx(loss, rel=1e-9)
        for W, V in zip(mlp.weights, expected.weights, strict=True):
            # seven steps, each with a solve of condition 1e3, each passing its error on
            assert_close(W, V, rtol=1e-9)


@every_method
def test_plain_steps(method):
    compare(method)


@every_method
def test_momentum(method):
    compare(method, momentum=0.9)


@every_method
def test_lr_that_means_what_it_means_for_sgd(method):
    compare(method, lr_scale="sgd", lr=0.5)


@every_method
@pytest.mark.parametrize("intervals", [(1, 2, 1), (2, 2, 1), (1, 3, 2), (2, 4, 3), (3, 1, 2)])
def test_intervals(method, intervals):
    compare(method, interval=intervals)


@every_method
def test_one_interval_is_three(method):
    compare(method, interval=(2, 2, 2))
    weights = []
    for interval in (2, (2, 2, 2), [2, 2, 2]):
        mlp = MLP(WIDTHS, rng=1)
        optimizer = NaturalGradient(mlp, method, 0.1, 0.05, fisher="exact", interval=interval)
        for x, y in stream(4):
            optimizer.step(x, y)
        weights.append(np.concatenate([W.ravel() for W in mlp.weights]))
    assert np.array_equal(weights[0], weights[1])
    assert np.array_equal(weights[0], weights[2])


@pytest.mark.parametrize("method", MEASURED)
@pytest.mark.parametrize("bases", [1, 2])
def test_warm_qr_bases(method, bases):
    compare(method, basis="qr", interval=(1, bases, 1))


@every_method
def test_no_memory_at_all(method):
    compare(method, decay=0.0)


def test_moving_the_average_is_not_a_detail():
    """The dense loop without the move must disagree with the package."""

    class Unmoved(DenseLayer):
        def update(self, k, a, g):
            before, kept = self.bases, self.measured
            super().update(k, a, g)
            if kept is not None:
                Q_old, Q = np.kron(*before), np.kron(*self.bases)
                stale = np.diag(Q_old.T @ kept @ Q_old)
                D = vec_by_loops(corrected_eigenvalues_by_loops(a, g, *self.bases))
                self.measured = Q * (self.decay * stale + (1 - self.decay) * D) @ Q.T

    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError, match="differs by"):
        patch.setitem(globals(), "DenseLayer", Unmoved)
        compare("tekfac", lr=1.0)


@every_method
@pytest.mark.parametrize("lr_scale", ["natural", "sgd"])
@pytest.mark.parametrize("rule", [0.05, Paper(0.05), Added(0.05), ByTrace(0.05), ByTrace(2.0, 0.1)])
def test_rules_on_a_network_with_a_convolution(method, rule, lr_scale):
    """λ of each layer and what it does there, by dense matrices; the second layer is dense."""
    net, expected = [ConvNet((2, 4, 4), 3, 3, rng=1) for _ in range(2)]
    optimizer = NaturalGradient(
        net, method, 0.1, rule, momentum=0.0, fisher="exact", decay=0.8, lr_scale=lr_scale
    )
    layers = [DenseLayer(method, decay=0.8) for _ in expected.weights]
    rng = np.random.default_rng(0)
    for k in range(3):
        x, y = (1 + k) * rng.normal(size=(6, 2, 4, 4)), rng.integers(3, size=6)
        for layer, s in zip(layers, expected.layer_statistics(x, fisher="exact"), strict=True):
            layer.update(k, s.a, s.g)
        dampings = [0.05, 0.05]
        if isinstance(rule, ByTrace):
            F = layers[0].undamped()
            of_the_convolution = rule.multiplier * max(np.trace(F), rule.floor) / len(F)
            dampings = [of_the_convolution, rule.damping * of_the_convolution]
        for i, M in enumerate(expected.gradients(x, y)):
            F, damping = layers[i].damped(dampings[i]), dampings[i]
            if isinstance(rule, Added):
                F = layers[i].undamped() + damping * np.eye(M.size)
            direction = solve_dense(F, M) * (damping if lr_scale == "sgd" else 1)
            expected.weights[i] = expected.weights[i] - 0.1 * direction
        optimizer.step(x, y)
        for W, V in zip(net.weights, expected.weights, strict=True):
            assert_close(W, V, rtol=1e-9)


@every_method
def test_by_trace_without_convolutions_is_the_number(method):
    weights = []
    for damping in (0.05, ByTrace(0.05, multiplier=3.0)):
        mlp = MLP(WIDTHS, rng=1)
        optimizer = NaturalGradient(mlp, method, 0.1, damping, fisher="exact")
        for x, y in stream(3):
            optimizer.step(x, y)
        weights.append(mlp.weights)
    for W, V in zip(*weights, strict=True):
        assert np.array_equal(W, V)


@pytest.mark.parametrize("fisher", ["exact", "empirical", "mc"])
def test_first_step_by_each_fisher(fisher):
    (x, y), lr, damping = next(stream(1)), 0.3, 0.1
    mlp = MLP(WIDTHS, rng=1)
    before = [W.copy() for W in mlp.weights]
    statistics = mlp.layer_statistics(x, y, fisher=fisher, rng=np.random.default_rng(5))
    gradients = mlp.gradients(x, y)
    rng = np.random.default_rng(5)
    NaturalGradient(mlp, "tekfac", lr, damping, fisher=fisher, rng=rng).step(x, y)
    for W, old, layer, gradient in zip(mlp.weights, before, statistics, gradients, strict=True):
        dense = DenseLayer("tekfac")
        dense.update(0, layer.a, layer.g)
        assert_close(W, old - lr * solve_dense(dense.damped(damping), gradient), rtol=1e-11)


@every_method
def test_one_step_solves_a_linear_regression(method):
    """The exact Fisher of a linear model is its Hessian, and every method is exact there."""
    rng = np.random.default_rng(0)
    x, W = rng.normal(size=(20, 3)), rng.normal(size=(2, 4))
    y = x @ W[:, :3].T + W[:, 3]
    mlp = MLP((3, 2), rng=0)
    optimizer = NaturalGradient(
        mlp, method, lr=1.0, damping=1e-14, fisher="exact", loss="squared_error"
    )
    optimizer.step(x, y)
    # factored damping adds √1e-14 to each factor: the step is off by 1e-7 times the condition
    assert np.abs(mlp.weights[0] - W).max() < 1e-5


def test_gradient_descent_with_momentum():
    mlp, expected = MLP(WIDTHS, rng=1), MLP(WIDTHS, rng=1)
    optimizer = GradientDescent(mlp, 0.1, momentum=0.9)
    velocity = [np.zeros_like(W) for W in expected.weights]
    for x, y in stream(5):
        loss, gradients = expected.loss(x, y), expected.gradients(x, y)
        for i, gradient in enumerate(gradients):
            velocity[i] = 0.9 * velocity[i] + gradient
            expected.weights[i] -= 0.1 * velocity[i]
        assert optimizer.step(x, y) == pytest.approx(loss, rel=1e-12)
        for W, V in zip(mlp.weights, expected.weights, strict=True):
            assert_close(W, V)


def small_problem():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 3))
    return x, (x[:, 0] * x[:, 1] > 0).astype(int)


@every_method
def test_training_lowers_the_loss_and_repeats_itself(method):
    x, y = small_problem()

    def run():
        mlp = MLP((3, 8, 2), rng=0)
        optimizer = NaturalGradient(
            mlp, method, lr=0.1, damping=0.1, momentum=0.5, rng=np.random.default_rng(1)
        )
        losses = train(optimizer, x, y, epochs=15, batch_size=20, rng=np.random.default_rng(2))
        return mlp, losses

    start = MLP((3, 8, 2), rng=0).loss(x, y)
    mlp, losses = run()
    assert losses.shape == (15,)
    assert losses[-1] == pytest.approx(mlp.loss(x, y), rel=1e-12)
    assert start > 0.6  # chance is log 2 = 0.69
    assert losses[-1] < 0.45
    assert np.array_equal(losses, run()[1])


def test_train_takes_every_example_once_per_epoch():
    x, y = small_problem()
    seen = []

    class Recorder:
        def __init__(self, mlp):
            self.mlp, self.loss = mlp, "cross_entropy"

        def step(self, x, y):
            seen.append((x.copy(), y.copy()))
            return 0.0

    train(Recorder(MLP((3, 2), rng=0)), x, y, epochs=2, batch_size=20, rng=np.random.default_rng(0))
    assert [len(batch) for batch, _ in seen] == [20, 20, 10] * 2
    for epoch in (seen[:3], seen[3:]):
        rows = np.vstack([np.column_stack(pair) for pair in epoch])
        expected = np.column_stack([x, y])
        assert np.array_equal(rows[np.lexsort(rows.T)], expected[np.lexsort(expected.T)])
    assert not np.array_equal(seen[0][0], seen[3][0])


@every_method
def test_a_bad_batch_leaves_the_weights_alone(method):
    (x, y) = next(stream(1))
    mlp = MLP(WIDTHS, rng=1)
    optimizer = NaturalGradient(mlp, method, 0.1, 0.1, fisher="exact")
    optimizer.step(x, y)
    before = [W.copy() for W in mlp.weights]
    x[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"\bx\b.*(nan|finite)"):
        optimizer.step(x, y)
    assert all(np.array_equal(W, V) for W, V in zip(mlp.weights, before, strict=True))


def test_a_step_that_fails_moves_no_layer():
    """With cross-entropy the last layer's G is singular: without damping only that layer fails."""
    rng = np.random.default_rng(0)
    mlp = MLP((3, 4, 3), rng=0)
    before = [W.copy() for W in mlp.weights]
    optimizer = NaturalGradient(mlp, "kfac", lr=0.1, damping=0.0, fisher="exact")
    x, y = rng.normal(size=(50, 3)), rng.integers(0, 3, size=50)
    with pytest.raises(ValueError, match="damping"):
        optimizer.step(x, y)
    for W, untouched in zip(mlp.weights, before, strict=True):
        np.testing.assert_array_equal(W, untouched)


def test_a_class_of_ones_own_is_a_method():
    """A KFAC that divides by twice what KFAC does moves the weights half as far."""

    class HalfKFAC(KFAC):
        def damped(self, damping):
            return 2 * super().damped(damping)

    x, y = next(stream(1))
    moves = []
    for method in ("kfac", HalfKFAC):
        mlp = MLP(WIDTHS, rng=1)
        before = [W.copy() for W in mlp.weights]
        NaturalGradient(mlp, method, 0.1, 0.1, fisher="exact").step(x, y)
        moves.append([W - V for W, V in zip(mlp.weights, before, strict=True)])
    for whole, half in zip(*moves, strict=True):
        np.testing.assert_allclose(half, whole / 2, rtol=1e-12, atol=1e-15)
