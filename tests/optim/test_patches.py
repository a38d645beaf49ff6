"""If this fails, a convolution's statistics are of pixels that its kernel does not see."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tekfac_edu.optim.layers import factored_layer
from tekfac_edu.optim.layers.patches import kernel_rows, patches
from tekfac_edu.optim.sampling import Grid

from . import oracles
from .networks import CASES, gaussian
from .oracles import assert_close, by_group, groups_of


def first_convolution(case):
    return case.make().get_submodule(case.layers[0])


CONVOLUTIONS = [case for case in CASES if case.name.startswith("Conv")]
WHOLE = [case for case in CONVOLUTIONS if groups_of(first_convolution(case)) == 1]
every_convolution = pytest.mark.parametrize("case", CONVOLUTIONS, ids=lambda case: case.name)
every_whole_one = pytest.mark.parametrize("case", WHOLE, ids=lambda case: case.name)
N = 3


def convolution_and_input(case, memory="contiguous"):
    """The first convolution of a case and pictures for it, laid out in memory in some way."""
    module, (x, _) = first_convolution(case), case.batch(N)
    if memory == "channels last":
        x = x[:, :, None] if x.ndim == 3 else x
        x = x.to(memory_format=torch.channels_last)
        x = x[:, :, 0] if isinstance(module, nn.Conv1d) else x
    elif memory == "part of a larger tensor":
        around = torch.full([size + 2 for size in x.shape], torch.nan, dtype=x.dtype)
        inside = around[tuple(slice(1, -1) for _ in x.shape)]
        x = inside.copy_(x)
    return module, x


every_memory = pytest.mark.parametrize(
    "memory", ["contiguous", "channels last", "part of a larger tensor"]
)


def positions(module, x):
    """(height, width) of the output, by running the module."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
        sizes = module(x).shape[2:]
    return (1, *sizes) if len(sizes) == 1 else (*sizes,)


def rows_by_counting(module, x):
    return np.array([oracles.patches(module, one.numpy()) for one in x])


@every_memory
@every_convolution
def test_patches_are_those_found_by_counting_places(case, memory):
    module, x = convolution_and_input(case, memory)
    assert np.array_equal(patches(module, x).numpy(), rows_by_counting(module, x))


@every_memory
@every_convolution
def test_patches_are_those_of_torch_unfold(case, memory):
    module, x = convolution_and_input(case, memory)
    padded = torch.tensor(np.array([oracles.padded(module, one.numpy()) for one in x]))
    sizes = (module.kernel_size, module.dilation, module.stride)
    if isinstance(module, nn.Conv1d):
        padded, sizes = padded[:, :, None], [(1, *size) for size in sizes]
    kernel, dilation, stride = sizes
    expected = functional.unfold(padded, kernel, dilation=dilation, stride=stride).mT
    assert torch.equal(patches(module, x), expected)


@every_whole_one
def test_patches_times_weight_are_the_output(case):
    module, x = convolution_and_input(case)
    weight = module.weight.flatten(1)
    bias = 0.0 if module.bias is None else module.bias
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
        expected = module(x).flatten(2).mT
    assert_close(patches(module, x) @ weight.T + bias, expected.detach())


@every_convolution
def test_patches_of_a_grid_are_the_rows_at_its_positions(case):
    module, x = convolution_and_input(case)
    height, width = positions(module, x)
    full = rows_by_counting(module, x)
    for down in (d for d in range(1, height + 1) if height % d == 0):
        for right in (d for d in range(1, width + 1) if width % d == 0):
            for i, j in np.ndindex(down, right):
                wanted = [
                    row * width + column
                    for row in range(height)
                    for column in range(width)
                    if row % down == i and column % right == j
                ]
                grid = Grid((down, right), (i, j))
                assert np.array_equal(patches(module, x, grid).numpy(), full[:, wanted])
                assert grid.share * len(wanted) == height * width


@every_memory
@every_convolution
def test_kernel_rows_hold_the_columns_of_the_patches(case, memory):
    """Row i of the kernel, element (j, c): column (c, i, j) of the patches."""
    module, x = convolution_and_input(case, memory)
    full = rows_by_counting(module, x)
    kernel = (1, *module.kernel_size)[-2:]
    rows = kernel_rows(module, x)
    assert len(rows) == kernel[0]
    for i, row in enumerate(rows):
        for j in range(kernel[1]):
            for c in range(module.in_channels):
                column = (c * kernel[0] + i) * kernel[1] + j
                ours = row[:, j * module.in_channels + c]
                assert np.array_equal(ours.numpy(), full[:, :, column])


@pytest.mark.parametrize("S", [1, 3])
@every_convolution
def test_each_example_s_gradient_is_that_of_a_loop_over_positions(case, S):
    """In groups, of each in its own; and nothing that they are made of is touched."""
    module, x = convolution_and_input(case)
    layer = factored_layer("layer", module, len(oracles.trained(module)) == 2)
    height, width = positions(module, x)
    image = (width,) if isinstance(module, nn.Conv1d) else (height, width)
    g = gaussian(S, N, module.out_channels, *image)
    a = np.stack([oracles.input_rows(module, one) for one in x], -3)
    rows = np.stack([np.stack([oracles.output_rows(module, one) for one in v], -3) for v in g], -4)
    d_out, d_in = layer.d_out, layer.d_in

    def summed(a, g):
        G = np.zeros((S, N, d_out, d_in))
        for s, n, t in np.ndindex(S, N, a.shape[1]):
            G[s, n] += np.outer(g[s, n, t], a[n, t])
        return G

    before = x.clone(), g.clone()
    assert_close(layer.example_gradients(x, list(g)), by_group(module, summed, a, rows))
    assert torch.equal(x, before[0]) and torch.equal(g, before[1])
