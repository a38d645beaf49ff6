"""Which modules are factored, and what each is in the one format that all maths here sees.

    a: (N, T, d_in)        the layer's inputs, a 1 appended if it has a bias
    g: (S, N, T, d_out)    its output gradients, S vectors per example

    Linear on (N, d)            T = 1
    Linear on (N, ..., d)       T = the product of the axes between
    Conv1d, Conv2d              T = output positions, d_in = C_in · kernel elements (+ 1)

With it every layer is s = W ā at T positions, its gradient matrix M is (d_out, d_in) with the bias
as the last column, and example n's gradient is G_n = Σ_t g_nt ā_ntᵀ.
"""

import math

import torch
from torch import nn
from torch.nn import functional

from tekfac_edu.optim.patches import patches


def is_factored_kind(module):
    """Whether the module is of a kind that this package factors."""
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)


def refusal(module):
    """Why a module with a weight cannot be factored though a reader would expect it to be; or None.

    Modules of other kinds (norms, embeddings) are not expected to be, and give None too.
    """
    if is_factored_kind(module):
        groups = getattr(module, "groups", 1)
        return f"it has groups={groups}, and only groups=1 is factored" if groups != 1 else None
    if isinstance(module, nn.modules.conv._ConvNd):
        return "of the convolutions, Conv1d and Conv2d are factored"
    if isinstance(module, nn.Bilinear):
        return "its output is not linear in one input"
    return None


def layer_inputs(module, x, has_bias, grid=None):
    """A module's input as a: (N, T, d_in), in float32 or, if x has it, float64.

    Parameters
    ----------
    x : the tensor the module was called with; its first axis is the examples.
    has_bias : whether to append a 1, so that the bias is one more column of the weight.
    grid : `Grid` of the positions wanted, all numbers times the root of its share: sums over
        positions of products of two keep their expectation. None: all.
    """
    x = at_least_float32(x)
    one = 1.0 if grid is None else math.sqrt(grid.share)
    x = x if grid is None else one * x
    if isinstance(module, nn.Linear):
        a = x.reshape(len(x), -1, module.in_features)
        a = a if grid is None else a[:, grid.slices[1]]
    else:
        a = patches(module, x, grid)
    return functional.pad(a, (0, 1), value=one) if has_bias else a


def layer_gradients(module, g, grid=None):
    """The gradient at a module's output as (N, T, d_out), in float32 or float64."""
    g = at_least_float32(g)
    if isinstance(module, nn.Linear):
        g = g.reshape(len(g), -1, module.out_features)
        return g if grid is None else g[:, grid.slices[1]]
    g = g[:, :, None] if isinstance(module, nn.Conv1d) else g
    g = g if grid is None else g[:, :, *grid.slices]
    return g.flatten(2).mT


def positions_of(module, g):
    """(height, width) of the positions, from the gradient at a module's output; T is the product.

    All but two-dimensional convolutions have height 1.
    """
    if isinstance(module, nn.Linear):
        return 1, math.prod(g.shape[1:-1])
    return (1, *g.shape[2:]) if isinstance(module, nn.Conv1d) else (*g.shape[2:],)


def batched(module, tensor):
    """An input or output of the module with a first axis for the examples, one if it had none.

    Raises
    ------
    ValueError
        If a convolution got a tensor with neither its batched nor its unbatched number of axes.
    """
    axes = 4 if isinstance(module, nn.Conv2d) else 3 if isinstance(module, nn.Conv1d) else None
    one_example = tensor.ndim == 1 if axes is None else tensor.ndim == axes - 1
    return tensor[None] if one_example else tensor


def gradient_matrix(weight_gradient, bias_gradient=None):
    """M: (d_out, d_in), from the gradients of weight and bias."""
    M = at_least_float32(weight_gradient).flatten(1)
    if bias_gradient is None:
        return M
    return torch.cat([M, at_least_float32(bias_gradient)[:, None]], 1)


def at_least_float32(x):
    """Statistics are in float32, or in float64 if x is."""
    return x if x.dtype == torch.float64 else x.float()
