"""If this fails, a convolution's statistics are of pixels that its kernel does not see."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tekfac_edu.optim.patches import Grid, draw_grid, kernel_rows, patches, rows_of_basis
from tekfac_edu.optim.rescaling import convolution_gradients, corrected_eigenvalues

from . import oracles
from .networks import CASES, double_precision
from .oracles import assert_close

CONVOLUTIONS = [case for case in CASES if case.name.startswith("Conv")]
every_convolution = pytest.mark.parametrize("case", CONVOLUTIONS, ids=lambda case: case.name)
N = 3


def convolution_and_input(case, memory="contiguous"):
    """The first convolution of a case and pictures for it, laid out in memory in some way."""
    module = next(m for m in case.make().modules() if isinstance(m, nn.Conv1d | nn.Conv2d))
    x, _ = case.batch(N)
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


@every_convolution
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


def random(*shape, seed=7):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def random_orthogonal(size, seed):
    return torch.linalg.qr(random(size, size, seed=seed))[0]


@every_convolution
def test_the_sum_over_kernel_rows_is_the_product_with_patches(case):
    """Of any matrix in place of the basis: nothing here needs it to be orthogonal."""
    module, x = convolution_and_input(case)
    d_in = module.weight[0].numel() + (module.bias is not None)
    Q = random(d_in, d_in + 1)
    full = rows_by_counting(module, x)
    g = random(N, 4, full.shape[1], seed=8)
    expected = [g[n].numpy() @ full[n] @ Q.numpy()[: full.shape[2]] for n in range(N)]
    pairs = zip(kernel_rows(module, x), rows_of_basis(module, Q), strict=True)
    assert_close(sum(g @ row.mT @ basis for row, basis in pairs), np.array(expected))


@pytest.mark.parametrize("S", [1, 3])
@every_convolution
def test_gradients_in_a_basis_are_those_of_a_loop_over_examples_and_positions(case, S):
    module, x = convolution_and_input(case)
    d_out, has_bias = module.out_channels, len(oracles.trained(module)) == 2
    height, width = positions(module, x)
    image = (width,) if isinstance(module, nn.Conv1d) else (height, width)
    g = random(S, N, d_out, *image)
    a = np.array([oracles.input_rows(module, one) for one in x])
    d_in = a.shape[2]
    Q_in, Q_out = random_orthogonal(d_in, 1), random_orthogonal(d_out, 2)
    expected = np.zeros((S, N, d_out, d_in))
    for s, n in np.ndindex(S, N):
        rows = oracles.output_rows(module, g[s, n])
        G = sum(np.outer(rows[t], a[n, t]) for t in range(len(rows)))
        expected[s, n] = Q_out.numpy().T @ G @ Q_in.numpy()
    G, Q_in_by_row = convolution_gradients(module, x, g, has_bias, Q_in, Q_out)
    assert_close(G @ Q_in_by_row, expected)
    D = corrected_eigenvalues(torch.tensor(a), g.flatten(3).mT, Q_in, Q_out)
    assert_close(D, (expected**2).sum((0, 1)) / N)


def test_gradients_of_a_convolution_do_not_touch_what_they_are_made_of():
    """They are summed in place."""
    module = double_precision(lambda: nn.Conv2d(2, 3, 3))
    x, g = random(N, 2, 5, 4), random(1, N, 3, 3, 2)
    Q_in, Q_out = random_orthogonal(19, 1), random_orthogonal(3, 2)
    inputs = [x, g, Q_in, Q_out]
    before = [tensor.clone() for tensor in inputs]
    convolution_gradients(module, x, g, True, Q_in, Q_out)
    assert all(torch.equal(*pair) for pair in zip(inputs, before, strict=True))


SIZES = [(1, 1), (1, 12), (7, 1), (4, 6), (5, 3), (8, 8), (1, 13)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_grid_has_at_least_the_positions_wanted_and_as_few_as_steps_that_divide_allow(
    height, width
):
    total = height * width
    possible = {
        (height // down) * (width // right): down * right
        for down in range(1, height + 1)
        for right in range(1, width + 1)
        if height % down == 0 and width % right == 0
    }
    draw = torch.Generator().manual_seed(0)
    for wanted in [0.01, *range(1, total + 3), 2.5, total - 0.5, 10.0 * total]:
        fewest = min((n for n in possible if n >= wanted), default=total)
        grid = draw_grid(height, width, wanted, draw)
        if fewest == total:
            assert grid is None
            continue
        down, right = grid.steps
        assert height % down == 0 and width % right == 0
        taken = torch.ones(height, width)[grid.slices].sum()
        assert taken == fewest
        assert grid.share == possible[fewest] == math.prod(grid.steps)


def test_of_equally_coarse_grids_the_squarest_is_taken():
    draw = torch.Generator().manual_seed(0)
    assert draw_grid(8, 8, 16, draw).steps == (2, 2)
    assert draw_grid(8, 8, 4, draw).steps == (4, 4)


def test_every_offset_is_drawn_about_as_often_from_the_seeds_of_successive_steps():
    """600 draws of 6 offsets: each 100 ± 9.1 by the binomial; 5 standard deviations are allowed."""
    counts = np.zeros((2, 3))
    for seed in range(600):
        grid = draw_grid(4, 6, 4, torch.Generator().manual_seed(seed))
        assert grid.steps == (2, 3)
        counts[grid.offsets] += 1
    assert abs(counts - 100).max() < 46
