"""What a convolution sees: patches of its padded input, and the same without copying patches.

    patches       (N, T, C·K)    row t: the K kernel elements around position t, channel by channel
    kernel rows   one (N, k_w·C, T) per row of the kernel: shifted views of an input that is copied
                  k_w times, not K; what is linear in the patches can be summed over them

T counts output positions, K kernel elements. A Conv1d is a convolution of images of height 1.
"""

import math

import torch
from torch import nn
from torch.nn import functional

PADDING_MODES = {
    "zeros": "constant",
    "reflect": "reflect",
    "replicate": "replicate",
    "circular": "circular",
}


def patches(module, x, grid=None):
    """(N, C, *image) -> (N, T, C · kernel elements), in the order of the flattened weight.

    In memory a column of it, over all examples and positions, lies together.

    grid : `Grid` of the positions wanted; None: all.
    """
    x, kernel, stride, dilation = _as_images(module, x)
    windows = _windows(x, kernel, stride, dilation)
    windows = windows if grid is None else windows[:, :, *grid.slices]
    N, C, height, width, *_ = windows.shape
    columns = windows.permute(1, 4, 5, 0, 2, 3).reshape(C * math.prod(kernel), N, height * width)
    return columns.permute(1, 2, 0)


def kernel_rows(module, x):
    """(N, C, *image) -> a list over kernel rows of (N, k_w · C, T) tensors; column, then channel.

    Row i, element (j, c) at position t is the pixel of channel c under kernel element (i, j).
    """
    x, kernel, stride, dilation = _as_images(module, x)
    height, width = (
        _outputs(x.shape[2 + axis], kernel[axis], stride[axis], dilation[axis]) for axis in (0, 1)
    )
    starts = [j * dilation[1] for j in range(kernel[1])]
    columns = [x[..., start : start + (width - 1) * stride[1] + 1 : stride[1]] for start in starts]
    x = torch.cat(columns, 1)
    starts = [i * dilation[0] for i in range(kernel[0])]
    return [
        x[:, :, start : start + (height - 1) * stride[0] + 1 : stride[0]].flatten(2)
        for start in starts
    ]


def rows_of_basis(module, Q_in):
    """The rows of Q_in, (d_in, d_in), that belong to each of `kernel_rows`: (k_w · C, d_in)."""
    kernel = (1, *module.kernel_size) if isinstance(module, nn.Conv1d) else module.kernel_size
    weights = module.in_channels * kernel[0] * kernel[1]
    by_element = Q_in[:weights].unflatten(0, (module.in_channels, *kernel))
    return [by_element[:, i].transpose(0, 1).flatten(0, 1) for i in range(kernel[0])]


def _as_images(module, x):
    """The padded input as images, and kernel size, stride and dilation in both directions."""
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    padding = _padding_before_and_after(module)
    if any(amount for pair in padding for amount in pair):
        last_axis_first = [amount for pair in reversed(padding) for amount in pair]
        x = functional.pad(x, last_axis_first, mode=PADDING_MODES[module.padding_mode])
    if isinstance(module, nn.Conv1d):
        x, kernel, stride, dilation = x[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
    return x, kernel, stride, dilation


def _windows(x, kernel, stride, dilation):
    """A view (N, C, height, width, k_h, k_w) of (N, C, H, W)."""
    sizes = [
        _outputs(x.shape[2 + axis], kernel[axis], stride[axis], dilation[axis]) for axis in (0, 1)
    ]
    n, c, down, right = x.stride()
    strides = (n, c, down * stride[0], right * stride[1], down * dilation[0], right * dilation[1])
    return x.as_strided((*x.shape[:2], *sizes, *kernel), strides)


def _outputs(size, kernel, stride, dilation):
    """Output positions along an axis of a padded image."""
    return (size - dilation * (kernel - 1) - 1) // stride + 1


def _padding_before_and_after(module):
    """[(before, after), ...] per image axis; "same" puts the odd element after."""
    if module.padding == "valid":
        return [(0, 0)] * len(module.kernel_size)
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(amount, amount) for amount in module.padding]
