"""If this fails, the book's convolution is not the one that everybody trains, or its gradient."""

import itertools
import re

import numpy as np
import pytest

from tekfac_edu.reference import (
    EKFAC,
    KFAC,
    MLP,
    TEKFAC,
    TKFAC,
    ConvNet,
    GradientDescent,
    LayerStatistics,
    NaturalGradient,
    exact_fisher,
    fisher_block,
    patches,
    trace_restricted_factors,
    train,
)

from .oracles import assert_close, fisher_by_loops, gradients_by_loops

torch = pytest.importorskip("torch")
from torch.nn import functional  # noqa: E402

from .autograd_oracles import ACTIVATIONS, LOSSES, torch_losses  # noqa: E402

IMAGES = (3, 2, 6, 7)  # N, C, height, width: none equal to another


def images(shape=IMAGES, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def padded_pixel(image, row, column, mode):
    """The pixel that stands at (row, column), which may lie outside of the image."""
    height, width = image.shape
    place = []
    for k, size in ((row, height), (column, width)):
        if 0 <= k < size:
            place.append(k)
        elif mode == "zeros":
            return 0.0
        elif mode == "replicate":
            place.append(0 if k < 0 else size - 1)
        elif mode == "circular":
            place.append(k + size if k < 0 else k - size)
        else:
            place.append(-k if k < 0 else 2 * (size - 1) - k)
    return image[tuple(place)]


def patches_by_loops(x, kernel, stride, padding, dilation, mode):
    """Pixel by pixel; padding ((top, bottom), (left, right))."""
    N, C, *sizes = x.shape
    counts = [
        (size + sum(pad) - d * (k - 1) - 1) // s + 1
        for size, pad, k, s, d in zip(sizes, padding, kernel, stride, dilation, strict=True)
    ]
    rows = np.zeros((N, counts[0] * counts[1], C * kernel[0] * kernel[1]))
    for n, i, j in itertools.product(range(N), *map(range, counts)):
        for c, p, q in itertools.product(range(C), *map(range, kernel)):
            row = i * stride[0] + p * dilation[0] - padding[0][0]
            column = j * stride[1] + q * dilation[1] - padding[1][0]
            entry = (c * kernel[0] + p) * kernel[1] + q
            rows[n, i * counts[1] + j, entry] = padded_pixel(x[n, c], row, column, mode)
    return rows


# kernel, stride, padding as given and as it must be understood, dilation
SETTINGS = {
    "plain": (3, 1, 0, ((0, 0), (0, 0)), 1),
    "kernel not square": ((2, 3), 1, 0, ((0, 0), (0, 0)), 1),
    "kernel of one": (1, 1, 0, ((0, 0), (0, 0)), 1),
    "kernel as large as the image": ((6, 7), 1, 0, ((0, 0), (0, 0)), 1),
    "stride": (3, 2, 0, ((0, 0), (0, 0)), 1),
    "stride that leaves a rest": (2, (4, 3), 0, ((0, 0), (0, 0)), 1),
    "stride past the end": (2, 50, 0, ((0, 0), (0, 0)), 1),
    "padding": (3, 1, 1, ((1, 1), (1, 1)), 1),
    "padding unequal": (3, 1, (2, 1), ((2, 2), (1, 1)), 1),
    "dilation": (2, 1, 0, ((0, 0), (0, 0)), (3, 2)),
    "everything": ((3, 2), (2, 3), (1, 2), ((1, 1), (2, 2)), (2, 3)),
    "valid": (3, 2, "valid", ((0, 0), (0, 0)), 1),
    "same": (3, 1, "same", ((1, 1), (1, 1)), 1),
    "same, even kernel": ((4, 2), 1, "same", ((1, 2), (0, 1)), 1),
    "same, dilated": ((3, 2), 1, "same", ((2, 2), (1, 2)), (2, 3)),
    "same, kernel of one": (1, 1, "same", ((0, 0), (0, 0)), 1),
}
MODES = ["zeros", "reflect", "replicate", "circular"]


def pair(value):
    return value if isinstance(value, tuple) else (value, value)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_patches_pixel_by_pixel(setting, mode):
    kernel, stride, padding, understood, dilation = SETTINGS[setting]
    x = images()
    expected = patches_by_loops(x, pair(kernel), pair(stride), understood, pair(dilation), mode)
    actual = patches(x, kernel, stride, padding, dilation, mode)
    assert actual.dtype == np.float64
    assert np.array_equal(actual, expected)


def torch_module(setting, mode, channels=5):
    kernel, stride, padding, _, dilation = SETTINGS[setting]
    torch.manual_seed(0)
    return torch.nn.Conv2d(
        IMAGES[1],
        channels,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        padding_mode=mode,
        dtype=torch.float64,
    )


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_product_with_the_patches_is_pytorchs_convolution(setting, mode):
    kernel, stride, padding, _, dilation = SETTINGS[setting]
    module, x = torch_module(setting, mode), images()
    with torch.no_grad():
        expected = module(torch.tensor(x)).flatten(2).mT.numpy()
    W = module.weight.detach().flatten(1).numpy()
    s = patches(x, kernel, stride, padding, dilation, mode) @ W.T + module.bias.detach().numpy()
    assert_close(s, expected)


@pytest.mark.parametrize("setting", ["plain", "everything", "kernel not square"])
def test_patches_are_pytorchs_unfold(setting):
    kernel, stride, padding, _, dilation = SETTINGS[setting]
    x = images()
    expected = functional.unfold(
        torch.tensor(x), kernel, dilation=dilation, padding=padding, stride=stride
    )
    assert np.array_equal(patches(x, kernel, stride, padding, dilation), expected.mT.numpy())


def test_patches_are_a_copy():
    x = images()
    rows = patches(x, 3)
    rows[:] = 0.0
    assert np.array_equal(x, images())


def test_integers_and_float32_become_float64():
    x = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    expected = patches(x.astype(np.float64), 2)
    for kind in (np.int64, np.float32):
        rows = patches(x.astype(kind), 2)
        assert rows.dtype == np.float64
        assert np.array_equal(rows, expected)


NETWORKS = {
    "flatten": {},
    "mean": {"readout": "mean"},
    "two input channels": {"image_shape": (2, 5, 4), "kernel_size": (3, 2)},
    "stride and padding": {"stride": 2, "padding": (1, 2), "padding_mode": "replicate"},
    "same, mean": {"padding": "same", "kernel_size": 2, "readout": "mean"},
    "dilated": {"dilation": (1, 2)},
    "relu": {"activation": "relu"},
    "sigmoid, mean": {"activation": "sigmoid", "readout": "mean"},
    "identity": {"activation": "identity"},
}
every_network = pytest.mark.parametrize("name", NETWORKS)
every_loss = pytest.mark.parametrize("loss", LOSSES)
CHANNELS, OUTPUTS, N = 3, 2, 4


def network(name, seed=0):
    """A ConvNet whose biases are not zero, so that a forgotten one is seen."""
    settings = {"image_shape": (1, 5, 6), "kernel_size": 3, **NETWORKS[name]}
    net = ConvNet(channels=CHANNELS, outputs=OUTPUTS, rng=seed, **settings)
    rng = np.random.default_rng(seed + 100)
    for W in net.weights:
        W += 0.3 * rng.normal(size=W.shape)
    return net


def data(net, loss):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(N, *net.image_shape))
    y = rng.integers(OUTPUTS, size=N) if loss == "cross_entropy" else rng.normal(size=(N, OUTPUTS))
    return x, y


def torch_network(net, name):
    """PyTorch's modules with the same weights: convolution, activation, readout, linear."""
    settings = {"kernel_size": 3, **NETWORKS[name]}
    C, *_ = settings.pop("image_shape", (1,))
    activation, readout = settings.pop("activation", "tanh"), settings.pop("readout", "flatten")
    convolution = torch.nn.Conv2d(C, CHANNELS, **settings, dtype=torch.float64)
    linear = torch.nn.Linear(net.weights[1].shape[1] - 1, OUTPUTS, dtype=torch.float64)
    with torch.no_grad():
        for module, W in zip((convolution, linear), net.weights, strict=True):
            module.weight.copy_(torch.tensor(W[:, :-1]).reshape(module.weight.shape))
            module.bias.copy_(torch.tensor(W[:, -1]))

    def forward(x):
        s = convolution(torch.as_tensor(x))
        h = ACTIVATIONS[activation](s)
        z = linear(h.mean((2, 3)) if readout == "mean" else h.flatten(1))
        return z, s

    return convolution, linear, forward


def joined(module):
    gradient = module.weight.grad.flatten(1)
    return torch.cat([gradient, module.bias.grad[:, None]], 1).numpy()


@every_network
@every_loss
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_outputs_loss_and_gradients(name, loss):
    net = network(name)
    x, y = data(net, loss)
    convolution, linear, forward = torch_network(net, name)
    z, _ = forward(x)
    mean = torch_losses(z, y, loss).mean()
    mean.backward()
    assert_close(net.forward(x), z.detach().numpy())
    assert net.loss(x, y, loss) == pytest.approx(mean.item(), rel=1e-13)
    for actual, module in zip(net.gradients(x, y, loss), (convolution, linear), strict=True):
        assert_close(actual, joined(module))


@every_network
@every_loss
@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_every_position_gets_the_gradient_of_its_own_example(name, loss, fisher):
    """Whatever the outputs send back, autograd's ∂(vector · z_n)/∂s_nt is the convolution's g."""
    net = network(name)
    x, y = data(net, loss)
    rng = np.random.default_rng(0)
    first, last = net.layer_statistics(x, y, fisher, loss, rng, num_samples=3)
    vectors = last.g if last.g.ndim == 3 else last.g[None]
    convolution, _, forward = torch_network(net, name)
    z, s = forward(x)
    expected = [
        torch.autograd.grad(z, s, torch.as_tensor(v), retain_graph=True)[0].flatten(2).mT.numpy()
        for v in vectors
    ]
    expected = np.stack(expected) if last.g.ndim == 3 else expected[0]
    assert isinstance(first, LayerStatistics)
    assert_close(first.g, expected)
    # and its input is what makes s: the patch, then a 1
    W = torch.cat([convolution.weight.flatten(1), convolution.bias[:, None]], 1).detach().numpy()
    assert_close(first.a @ W.T, s.flatten(2).mT.detach().numpy())
    assert (first.a[..., -1] == 1.0).all()
    assert (last.a[..., -1] == 1.0).all()


@every_loss
@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("name", ["flatten", "mean"])
def test_outputs_send_back_what_an_mlps_outputs_do(name, fisher, loss):
    """The dense layer is an MLP of one layer with the same weights, fed with its own input."""
    net = network(name)
    x, y = data(net, loss)
    last = net.layer_statistics(x, y, fisher, loss, np.random.default_rng(5), num_samples=2)[1]
    alone = MLP((last.a.shape[1] - 1, OUTPUTS))
    alone.weights[0][:] = net.weights[1]
    (expected,) = alone.layer_statistics(
        last.a[:, :-1], y, fisher, loss, np.random.default_rng(5), num_samples=2
    )
    assert np.array_equal(last.a, expected.a)
    assert_close(last.g, expected.g, rtol=1e-13)


@every_network
@every_loss
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_the_exact_block_is_the_gauss_newton_matrix(name, loss):
    """Jᵀ H J by autograd through PyTorch's own modules, vec column by column: block and whole."""
    net = network(name)
    x, _ = data(net, loss)
    convolution, dense, forward = torch_network(net, name)
    modules = convolution, dense
    z, _ = forward(x)
    F = 0.0
    for n in range(N):
        rows = []
        for c in range(OUTPUTS):
            parameters = [p for module in modules for p in (module.weight, module.bias)]
            g = torch.autograd.grad(z[n, c], parameters, retain_graph=True)
            layers = [torch.cat([g[k].flatten(1), g[k + 1][:, None]], 1) for k in (0, 2)]
            rows.append(torch.cat([layer.T.flatten() for layer in layers]).numpy())
        J, H = np.stack(rows), np.eye(OUTPUTS)
        if loss == "cross_entropy":
            p = torch.softmax(z[n], 0).detach().numpy()
            H = np.diag(p) - np.outer(p, p)
        F = F + J.T @ H @ J / N
    layer = net.layer_statistics(x, loss=loss)[0]
    size = net.weights[0].size
    assert_close(fisher_block(layer.a, layer.g), F[:size, :size], rtol=1e-11)
    assert_close(exact_fisher(net, x, loss), F, rtol=1e-11)


@every_loss
@pytest.mark.parametrize("name", ["flatten", "mean"])
def test_gradients_by_finite_differences_of_the_networks_own_loss(name, loss):
    net = network(name)
    x, y = data(net, loss)
    step = 1e-6
    for W, gradient in zip(net.weights, net.gradients(x, y, loss), strict=True):
        for place in np.ndindex(W.shape):
            kept = W[place]
            W[place] = kept + step
            above = net.loss(x, y, loss)
            W[place] = kept - step
            below = net.loss(x, y, loss)
            W[place] = kept
            # rounding 1e-16 / 1e-6, and the third derivative times 1e-12
            assert gradient[place] == pytest.approx((above - below) / (2 * step), abs=1e-8)


@pytest.mark.parametrize("name", ["flatten", "mean"])
def test_statistics_give_the_loops_block_and_gradients(name):
    net = network(name)
    x, y = data(net, "cross_entropy")
    exact = net.layer_statistics(x[:2])[0]
    a, g = exact.a, exact.g
    assert a.shape == (2, 12, 10)
    assert g.shape == (OUTPUTS, 2, 12, CHANNELS)
    assert_close(fisher_block(a, g), fisher_by_loops(a, g))
    own = net.layer_statistics(x, y, fisher="empirical")[0]
    assert own.g.shape == (N, 12, CHANNELS)
    mean = gradients_by_loops(own.a, own.g)[0].mean(axis=0)
    assert_close(net.gradients(x, y)[0], mean)


def test_a_kernel_as_large_as_the_image_is_an_mlp():
    x = np.random.default_rng(0).normal(size=(5, 2, 3, 4))
    net, mlp = ConvNet((2, 3, 4), 6, 3, kernel_size=(3, 4), rng=2), MLP((24, 6, 3), rng=2)
    for W, V in zip(net.weights, mlp.weights, strict=True):
        assert np.array_equal(W, V)
    assert_close(net.forward(x), mlp.forward(x.reshape(5, -1)), rtol=1e-14)
    layers = zip(net.layer_statistics(x), mlp.layer_statistics(x.reshape(5, -1)), strict=True)
    for one, other in layers:
        assert_close(fisher_block(one.a, one.g), fisher_block(other.a, other.g))


def test_an_examples_statistics_do_not_depend_on_its_batch():
    net = network("flatten")
    x, _ = data(net, "cross_entropy")
    together = net.layer_statistics(x)
    for n in range(N):
        alone = net.layer_statistics(x[n : n + 1])
        for layer, single in zip(together, alone, strict=True):
            assert_close(layer.a[n : n + 1], single.a, rtol=1e-13)
            assert_close(layer.g[:, n : n + 1], single.g, rtol=1e-13)


def test_sizes_and_seeds():
    settings = {"image_shape": (2, 6, 5), "channels": 4, "outputs": 3, "kernel_size": (3, 2)}
    flatten = ConvNet(**settings, rng=3)
    assert [W.shape for W in flatten.weights] == [(4, 13), (3, 4 * 16 + 1)]
    mean = ConvNet(**settings, readout="mean", rng=3)
    assert [W.shape for W in mean.weights] == [(4, 13), (3, 5)]
    assert np.array_equal(flatten.weights[0], mean.weights[0])
    for W in flatten.weights:
        assert W.dtype == np.float64
        assert not W[:, -1].any()
        assert W[:, :-1].all()
    again, other = ConvNet(**settings, rng=np.random.default_rng(3)), ConvNet(**settings, rng=4)
    assert np.array_equal(again.weights[1], flatten.weights[1])
    assert not np.array_equal(other.weights[1], flatten.weights[1])
    large = ConvNet((2, 6, 5), 400, 3, (3, 2), rng=0).weights[0][:, :-1]
    # 4800 numbers of variance 1/12: five deviations of √(2/4800)
    assert abs((large**2).mean() * 12 - 1) < 5 * np.sqrt(2 / 4800)


def two_classes(count=60):
    """A bright square left or right, and noise."""
    rng = np.random.default_rng(0)
    y = rng.integers(2, size=count)
    x = 0.3 * rng.normal(size=(count, 1, 4, 4))
    x[y == 0, :, 1:3, :2] += 1.0
    x[y == 1, :, 1:3, 2:] += 1.0
    return x, y


@pytest.mark.parametrize("method", ["sgd", "kfac", "ekfac", "tkfac", "tekfac"])
def test_the_chapters_optimizers_train_it(method):
    x, y = two_classes()
    net = ConvNet((1, 4, 4), 3, 2, kernel_size=2, rng=0)
    if method == "sgd":
        optimizer = GradientDescent(net, 0.1)
    else:
        optimizer = NaturalGradient(net, method, 0.1, 0.1, fisher="exact")
    history = train(optimizer, x, y, epochs=5, batch_size=20, rng=np.random.default_rng(0))
    assert history[-1] < 0.1  # from log 2


# What the chapter says, on batches of its own ---------------------------------------------------


def with_positions(seed=0, N=5, T=3, S=2, d_in=3, d_out=2):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(N, T, d_in)), rng.normal(size=(S, N, T, d_out))


def same_and_cross(a, g):
    """Both parts of the block, term by term."""
    S, N, T, d_out = g.shape
    d_in = a.shape[2]
    same, cross = np.zeros((2, d_in * d_out, d_in * d_out))
    for n, s, t, u in itertools.product(range(N), range(S), range(T), range(T)):
        left, right = np.kron(a[n, t], g[s, n, t]), np.kron(a[n, u], g[s, n, u])
        part = same if t == u else cross
        part += np.outer(left, right) / N
    return same, cross


def test_tkfac_has_the_trace_of_the_same_position_part_and_the_corrected_that_of_the_block():
    a, g = with_positions()
    same, cross = same_and_cross(a, g)
    assert_close(fisher_block(a, g), same + cross)
    assert abs(np.trace(cross)) > 0.01 * np.trace(same)
    assert trace_restricted_factors(a, g).delta == pytest.approx(np.trace(same), rel=1e-13)
    assert TKFAC.fit(a, g).trace() == pytest.approx(np.trace(same), rel=1e-13)
    for method in (EKFAC, TEKFAC):
        assert method.fit(a, g).trace() == pytest.approx(np.trace(same + cross), rel=1e-13)


def test_a_block_is_at_most_the_number_of_positions_times_its_same_position_part():
    for seed in range(5):
        a, g = with_positions(seed)
        same, cross = same_and_cross(a, g)
        assert np.linalg.eigvalsh(3 * same - (same + cross))[0] > -1e-12 * np.trace(same)


def test_uncorrelated_positions_leave_the_same_position_part():
    a, g = with_positions()
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=3)))
    all_a = np.concatenate([a for _ in signs])
    all_g = np.concatenate([g * pattern[:, None] for pattern in signs], axis=1)
    assert_close(fisher_block(all_a, all_g), same_and_cross(a, g)[0])


@pytest.mark.parametrize("method", [KFAC, TKFAC])
def test_uncorrected_methods_see_rows(method):
    a, g = with_positions()
    rows = method.fit(a.reshape(15, 3), g.reshape(2, 15, 2))
    assert_close(method.fit(a, g).dense(), 3 * rows.dense())


@pytest.mark.parametrize(("plain", "corrected"), [(KFAC, EKFAC), (TKFAC, TEKFAC)])
def test_right_triangle_with_positions(plain, corrected):
    a, g = with_positions()
    F = sum(same_and_cross(a, g))
    P, C = plain.fit(a, g).dense(), corrected.fit(a, g).dense()
    assert np.sum((F - P) ** 2) == pytest.approx(np.sum((F - C) ** 2) + np.sum((C - P) ** 2))
    assert np.sum((C - P) ** 2) > 1e-3 * np.sum(F**2)


# Bad input --------------------------------------------------------------------------------------

x = np.ones((2, 1, 4, 5))
BAD_PATCHES = {
    "x has three axes": ("x", r"\(1, 4, 5\)", (x[0], 3), {}),
    "x is flat": ("x", r"\(2, 20\)", (x.reshape(2, 20), 3), {}),
    "x empty": ("x", r"\(0, 1, 4, 5\)", (x[:0], 3), {}),
    "x nan": ("x", "NaN", (np.where(x > 0, np.nan, x), 3), {}),
    "x complex": ("x", "complex", (x * 1j, 3), {}),
    "kernel 0": ("kernel_size", "0", (x, 0), {}),
    "kernel 2.5": ("kernel_size", r"2\.5", (x, 2.5), {}),
    "kernel of three": ("kernel_size", r"\(3, 3, 3\)", (x, (3, 3, 3)), {}),
    "kernel too tall": ("kernel_size", r"\(5, 5\).*\(4, 5\)", (x, 5), {}),
    "kernel too wide": ("kernel_size", r"\(1, 6\).*\(4, 5\)", (x, (1, 6)), {}),
    "kernel too wide, dilated": ("dilation", r"\(1, 7\).*\(4, 5\)", (x, (1, 3)), {"dilation": 3}),
    "stride 0": ("stride", "0", (x, 3), {"stride": 0}),
    "stride, one of two": ("stride", "-1", (x, 3), {"stride": (1, -1)}),
    "dilation 0": ("dilation", "0", (x, 3), {"dilation": 0}),
    "dilation True": ("dilation", "True", (x, 3), {"dilation": True}),
    "padding negative": ("padding", "-1", (x, 3), {"padding": -1}),
    "padding a word": ("padding", "full", (x, 3), {"padding": "full"}),
    "padding of four": ("padding", r"\(1, 1, 1, 1\)", (x, 3), {"padding": (1, 1, 1, 1)}),
    "same with stride": ("padding", r"\(2, 2\)", (x, 3), {"padding": "same", "stride": 2}),
    "padding_mode": ("padding_mode", "mirror", (x, 3), {"padding": 1, "padding_mode": "mirror"}),
    "reflected too far": ("padding", "4", (x, 3), {"padding": 4, "padding_mode": "reflect"}),
    "wrapped too far": ("padding", "5", (x, 3), {"padding": 5, "padding_mode": "circular"}),
}


def refuses(argument, got, call):
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert re.search(rf"(?<![\w']){argument}(?![\w'])", message), message
    assert re.search(got, message), message


@pytest.mark.parametrize("case", BAD_PATCHES)
def test_patches_refuse(case):
    argument, got, arguments, settings = BAD_PATCHES[case]
    refuses(argument, got, lambda: patches(*arguments, **settings))


def test_an_image_may_be_reflected_and_wrapped_as_far_as_it_goes():
    assert patches(x, 3, padding=3, padding_mode="reflect").shape == (2, 8 * 9, 9)
    assert patches(x, 3, padding=4, padding_mode="circular").shape == (2, 10 * 11, 9)


BAD_NETWORKS = {
    "image without channels": ("image_shape", r"\(4, 5\)", {"image_shape": (4, 5)}),
    "image of width 0": ("image_shape", "0", {"image_shape": (1, 4, 0)}),
    "no channels": ("channels", "0", {"channels": 0}),
    "half an output": ("outputs", r"2\.5", {"outputs": 2.5}),
    "kernel too large": ("kernel_size", r"\(6, 6\)", {"kernel_size": 6}),
    "padding": ("padding", "-1", {"padding": -1}),
    "activation": ("activation", "swish", {"activation": "swish"}),
    "readout": ("readout", "max", {"readout": "max"}),
    "rng": ("rng", "seven", {"rng": "seven"}),
}


@pytest.mark.parametrize("case", BAD_NETWORKS)
def test_networks_refuse(case):
    argument, got, changed = BAD_NETWORKS[case]
    settings = {"image_shape": (1, 4, 5), "channels": 2, "outputs": 3, **changed}
    refuses(argument, got, lambda: ConvNet(**settings))


def net():
    return ConvNet((1, 4, 5), 2, 3)


BAD_CALLS = {
    "x of another size": ("x", r"\(2, 1, 5, 4\)", lambda: net().forward(x.mT)),
    "x flat": ("x", r"\(2, 20\)", lambda: net().forward(x.reshape(2, 20))),
    "fisher": ("fisher", "type-2", lambda: net().layer_statistics(x, fisher="type-2")),
    "loss": ("loss", "hinge", lambda: net().layer_statistics(x, loss="hinge")),
    "mc without rng": ("rng", "None", lambda: net().layer_statistics(x, fisher="mc")),
    "empirical without y": (
        "y",
        "empirical",
        lambda: net().layer_statistics(x, fisher="empirical"),
    ),
    "a label too large": ("y", "3", lambda: net().loss(x, np.array([0, 3]))),
    "gradients, labels": ("y", r"\(1,\)", lambda: net().gradients(x, np.array([0]))),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_calls_refuse(case):
    refuses(*BAD_CALLS[case])


def test_what_would_be_right_is_said():
    with pytest.raises(ValueError, match=r"\(N, 1, 4, 5\)"):
        net().forward(x.mT)
