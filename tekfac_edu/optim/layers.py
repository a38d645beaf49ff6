"""Which modules are factored, and what each is in the one format that all maths here sees.

    a: (N, T, d_in)        the layer's inputs, a 1 appended if it has a bias
    g: (S, N, T, d_out)    its output gradients, S vectors per example

    Linear on (N, d)            T = 1
    Linear on (N, ..., d)       T = the product of the axes between
    Conv1d, Conv2d              T = output positions, d_in = C_in · kernel elements (+ 1)

With it every layer is s = W ā at T positions, its gradient matrix M is (d_out, d_in) with the bias
as the last column, and example n's gradient is G_n = Σ_t g_nt ā_ntᵀ.
"""

import torch
from torch import nn
from torch.nn import functional

PADDING_MODES = {
    "zeros": "constant",
    "reflect": "reflect",
    "replicate": "replicate",
    "circular": "circular",
}


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


def layer_inputs(module, x, has_bias):
    """A module's input as a: (N, T, d_in), in float32 or, if x has it, float64.

    Parameters
    ----------
    x : the tensor the module was called with; its first axis is the examples.
    has_bias : whether to append a 1, so that the bias is one more column of the weight.
    """
    x = _at_least_float32(x)
    if isinstance(module, nn.Linear):
        a = x.reshape(len(x), -1, module.in_features)
    else:
        a = _patches(module, x)
    return functional.pad(a, (0, 1), value=1.0) if has_bias else a


def layer_gradients(module, g):
    """The gradient at a module's output as (N, T, d_out), in float32 or float64."""
    g = _at_least_float32(g)
    if isinstance(module, nn.Linear):
        return g.reshape(len(g), -1, module.out_features)
    return g.flatten(2).mT


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
    M = _at_least_float32(weight_gradient).flatten(1)
    if bias_gradient is None:
        return M
    return torch.cat([M, _at_least_float32(bias_gradient)[:, None]], 1)


def _patches(module, x):
    """(N, C, *image) -> (N, T, C · kernel elements), in the order of the flattened weight."""
    kernel, stride = module.kernel_size, module.stride
    dilation, padding = module.dilation, _padding_before_and_after(module)
    if any(amount for pair in padding for amount in pair):
        last_axis_first = [amount for pair in reversed(padding) for amount in pair]
        x = functional.pad(x, last_axis_first, mode=PADDING_MODES[module.padding_mode])
    if isinstance(module, nn.Conv1d):  # an image of height 1
        x, kernel, stride, dilation = x[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
    return functional.unfold(x, kernel, dilation, padding=0, stride=stride).mT


def _padding_before_and_after(module):
    """[(before, after), ...] per image axis; "same" puts the odd element after."""
    if module.padding == "valid":
        return [(0, 0)] * len(module.kernel_size)
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(amount, amount) for amount in module.padding]


def _at_least_float32(x):
    return x if x.dtype == torch.float64 else x.float()
