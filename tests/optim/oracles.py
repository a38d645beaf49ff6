"""A layer's inputs and gradients, example by example, from autograd and index arithmetic alone.

    G_sn = Σ_t g_snt ā_ntᵀ = ∂(objective s of example n)/∂(W, b)

Every example goes through the model on its own, as a batch of one; patches are cut out of a padded
input by counting. Shapes: a (N, T, d_in), g (S, N, T, d_out), with T = 1 for a layer without
positions; of a convolution in groups these with an axis of groups in front. An *objective* is a
scalar of one example; its gradient is one of the S vectors that the example sends back. Give these
functions a model that no optimizer has touched.
"""

from functools import cache

import numpy as np
import torch
from torch import nn
from torch.nn import functional

PADDING_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def cross_entropy(model, x, y):
    return functional.cross_entropy(model(x), y)


def half_squared_error(model, x, y):
    return 0.5 * ((model(x) - y) ** 2).sum(1).mean()


def objectives_empirical(loss_of):
    """The one objective of the empirical Fisher: the example's own loss."""
    return lambda model, *one: [loss_of(model, *one)]


def objectives_categorical(model, x, *_):
    """√p(c|x) · (−log p(c|x)) for every class c, the factor in front held constant."""
    log_p = torch.log_softmax(model(x)[0], 0)
    return [-log_p[c] * log_p[c].detach().exp().sqrt() for c in range(len(log_p))]


def objectives_bernoulli(model, x, *_):
    """√p(y_c|x) · (−log p(y_c|x)) for both values of every output, each a coin of its own."""
    return [
        -log_p * log_p.detach().exp().sqrt()
        for z in model(x)[0]
        for log_p in (functional.logsigmoid(-z), functional.logsigmoid(z))
    ]


def objectives_gaussian(model, x, *_):
    """Every output by itself: for unit variance the Fisher is Σ_c ∇z_c ∇z_cᵀ."""
    return list(model(x)[0])


def examples(batch):
    """Batches of one, each a list of tensors."""
    return [[tensor[n : n + 1] for tensor in batch] for n in range(len(batch[0]))]


def trained(module):
    """The parameters of a layer that its matrix (W, b) holds: without a bias that is frozen."""
    with_bias = module.bias is not None and module.bias.requires_grad
    return [module.weight, module.bias] if with_bias else [module.weight]


def weight_matrix(weight, bias=None):
    """(d_out, d_in) as the formulas have it: kernels flattened, the bias as last column."""
    matrix = weight.detach().numpy().reshape(len(weight), -1)
    return matrix if bias is None else np.hstack([matrix, bias.detach().numpy()[:, None]])


def groups_of(module):
    """How many independent maps side by side a module is."""
    return getattr(module, "groups", 1)


def by_group(module, formula, *arrays):
    """A formula of one group's arrays; of a module in groups, of each group's, one by one."""
    if groups_of(module) == 1:
        return formula(*arrays)
    results = [formula(*group) for group in zip(*arrays, strict=True)]
    if isinstance(results[0], tuple):
        return tuple(map(np.stack, zip(*results, strict=True)))
    return np.stack(results)


def matrices(module, parameters):
    """`weight_matrix` of each group of a module's, from its parameters or tensors like them."""
    matrix, groups = weight_matrix(*parameters), groups_of(module)
    return matrix if groups == 1 else np.array(np.split(matrix, groups))


def per_example_gradients(model, module, objectives, batch):
    """∂(objective)/∂(W, b) for one module: (S, N, d_out, d_in). Nothing is said about a or g."""
    per_example = [
        [matrices(module, _gradients(value, trained(module))) for value in objectives(model, *one)]
        for one in examples(batch)
    ]
    return np.moveaxis(np.array(per_example), (1, 0), (-4, -3))


def layer_rows(model, module, objectives, batch):
    """a (N, T, d_in) and g (S, N, T, d_out) of one module; several calls are further positions."""
    a, g = [], []
    for one in examples(batch):
        inputs, outputs, values = _watched(model, module, objectives, one)
        a.append(np.concatenate([input_rows(module, x[0]) for x in inputs], -2))
        g.append(
            [
                np.concatenate([output_rows(module, y[0]) for y in _gradients(value, outputs)], -2)
                for value in values
            ]
        )
    return np.stack(a, -3), np.moveaxis(np.array(g), (1, 0), (-4, -3))


def layer_rows_of_batch(model, module, loss_of, batch):
    """The same where examples are coupled (batch norm in training mode), from one pass of all.

    g is then N times the gradient of the mean loss, the only meaning that "its own" has left.
    """
    N = len(batch[0])
    inputs, outputs, (value,) = _watched(model, module, objectives_empirical(loss_of), batch)
    gradients = _gradients(N * value, outputs)
    a = [np.concatenate([input_rows(module, x[n]) for x in inputs], -2) for n in range(N)]
    g = [np.concatenate([output_rows(module, dy[n]) for dy in gradients], -2) for n in range(N)]
    return np.stack(a, -3), np.expand_dims(np.stack(g, -3), -4)


def _watched(model, module, objectives, batch):
    """The inputs and outputs of each call of the module, and the values made from them."""
    inputs, outputs = [], []

    def watch(_, arguments, output):
        inputs.append(arguments[0].detach().clone())
        outputs.append(output)
        return output.clone()  # what comes after may write in place

    handle = module.register_forward_hook(watch)
    values = objectives(model, *batch)
    handle.remove()
    return inputs, outputs, values


def _gradients(value, outputs):
    return torch.autograd.grad(value, outputs, retain_graph=True)


def input_rows(module, x):
    """One example's ā at every position: (T, d_in), from the module's input without batch axis."""
    x = x.numpy()
    if groups_of(module) > 1:
        channels = np.split(x, groups_of(module))
        rows = np.stack([patches(module, of_one_group) for of_one_group in channels])
    elif isinstance(module, nn.Linear):
        rows = np.stack([x[position] for position in np.ndindex(*x.shape[:-1])])
    else:
        rows = patches(module, x)
    ones = np.ones((*rows.shape[:-1], len(trained(module)) - 1))
    return np.concatenate([rows, ones], -1)


def output_rows(module, dy):
    """One example's g at every position: (T, d_out)."""
    dy = dy.numpy()
    if isinstance(module, nn.Linear):
        return np.array([dy[position] for position in np.ndindex(*dy.shape[:-1])])
    rows = np.array([dy[(slice(None), *position)] for position in np.ndindex(*dy.shape[1:])])
    groups = groups_of(module)
    return rows if groups == 1 else np.stack(np.split(rows, groups, axis=1))


def patches(module, x):
    """What the kernel sees at every output position of a convolution: x (C, *sizes)."""
    x = padded(module, x)
    return x.flatten()[places(x.shape, module.kernel_size, module.stride, module.dilation)]


@cache
def places(shape, kernel, stride, dilation):
    """Where in the flattened, padded input (C, *sizes) those numbers stand: (T, C · kernel)."""
    channels, *sizes = shape
    counts = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(sizes, kernel, stride, dilation, strict=True)
    ]
    rows = []
    for position in np.ndindex(*counts):
        row = []
        for channel, *offset in np.ndindex(channels, *kernel):
            place = channel
            for axis, size in enumerate(sizes):
                step = position[axis] * stride[axis] + offset[axis] * dilation[axis]
                place = place * size + step
            row.append(place)
        rows.append(row)
    return np.array(rows)


def padded(module, x):
    """x (C, *sizes) with the module's padding around it."""
    axes = range(len(module.kernel_size))
    if module.padding == "valid":
        widths = [(0, 0) for _ in axes]
    elif module.padding == "same":  # an odd number of padded places: the extra one comes last
        totals = [module.dilation[i] * (module.kernel_size[i] - 1) for i in axes]
        widths = [(total // 2, total - total // 2) for total in totals]
    else:
        widths = [(module.padding[i], module.padding[i]) for i in axes]
    return np.pad(x, [(0, 0), *widths], mode=PADDING_MODES[module.padding_mode])


def vec(M):
    """Columns stacked."""
    return np.concatenate([M[:, j] for j in range(M.shape[1])])


def fisher_block(G):
    """E_n[Σ_s vec(G_sn) vec(G_sn)ᵀ] from per-example gradients (S, N, d_out, d_in)."""
    S, N = G.shape[:2]
    return sum(np.outer(vec(G[s, n]), vec(G[s, n])) for s in range(S) for n in range(N)) / N


def second_moments(G, Q_in, Q_out):
    """S* or Θ: E_n[Σ_s (Q_outᵀ G_sn Q_in)²], (d_out, d_in)."""
    S, N = G.shape[:2]
    return sum((Q_out.T @ G[s, n] @ Q_in) ** 2 for s in range(S) for n in range(N)) / N


def factors_of_independence(a, g):
    """A = E[Σ_t ā āᵀ] and G = E[(1/T) Σ_t Σ_s g gᵀ]."""
    N, T, _ = a.shape
    A = sum(np.outer(row, row) for row in a.reshape(N * T, -1)) / N
    G = sum(np.outer(row, row) for row in g.reshape(-1, g.shape[-1])) / (N * T)
    return A, G


def trace_restricted_numerators(a, g):
    """δ, δΦ and δΨ: each example's and position's own traces stand inside the mean."""
    (S, N, T, d_out), d_in = g.shape, a.shape[2]
    delta, left, right = 0.0, np.zeros((d_in, d_in)), np.zeros((d_out, d_out))
    for n, t in np.ndindex(N, T):
        Lambda = np.outer(a[n, t], a[n, t])
        Gamma = sum(np.outer(g[s, n, t], g[s, n, t]) for s in range(S))
        delta += np.trace(Lambda) * np.trace(Gamma) / N
        left += np.trace(Gamma) * Lambda / N
        right += np.trace(Lambda) * Gamma / N
    return delta, left, right


def summed_numerators(a, g):
    """δ, δΦ and δΨ of each example's gradient, summed over its positions: partial traces of F."""
    (S, N, T, d_out), d_in = g.shape, a.shape[2]
    F = np.zeros((d_in, d_out, d_in, d_out))
    for s, n in np.ndindex(S, N):
        G = sum(np.outer(a[n, t], g[s, n, t]) for t in range(T))
        F += np.multiply.outer(G, G) / N
    left = sum(F[:, o, :, o] for o in range(d_out))
    right = sum(F[i, :, i, :] for i in range(d_in))
    return np.trace(left), left, right


def assert_close(actual, expected, rtol=1e-10):
    """Same shape, and every entry within rtol of the largest expected one; no absolute part."""
    actual = actual.detach().numpy() if isinstance(actual, torch.Tensor) else np.asarray(actual)
    expected = np.asarray(expected)
    assert actual.dtype == np.float64, f"dtype {actual.dtype}"
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    assert np.isfinite(actual).all(), "not finite"
    scale, worst = np.abs(expected).max(), np.abs(actual - expected).max()
    assert worst <= rtol * scale, f"differs by {worst:.3e}, largest entry {scale:.3e}"
