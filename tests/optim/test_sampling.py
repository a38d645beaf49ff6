"""If this fails, what is drawn is not what was asked for, or some of it is drawn too often."""

import math

import numpy as np
import pytest
import torch

from tekfac_edu.optim.sampling import draw_examples, draw_grid

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


@pytest.mark.parametrize("share", [None, 7, 8, 10**9])
def test_all_examples_are_not_drawn(share):
    assert draw_examples(7, share, None) == (None, 1)


@pytest.mark.parametrize("share", [1, 3, 6])
def test_drawn_examples_are_different_ones_that_stand_for_all(share):
    chosen, stands_for = draw_examples(7, share, torch.Generator().manual_seed(share))
    assert len(set(chosen.tolist())) == share
    assert set(chosen.tolist()) <= set(range(7))
    assert stands_for * share == pytest.approx(7, rel=1e-15)


def test_every_example_is_drawn_about_as_often_from_the_seeds_of_successive_steps():
    """800 draws of 2 of 8: each 200 ± 12.2 by the binomial; 5 standard deviations are allowed."""
    counts = np.zeros(8)
    for seed in range(800):
        chosen, _ = draw_examples(8, 2, torch.Generator().manual_seed(seed))
        counts[chosen.numpy()] += 1
    assert counts.sum() == 1600
    assert abs(counts - 200).max() < 61
