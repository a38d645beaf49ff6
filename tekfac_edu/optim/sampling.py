"""Fewer examples, fewer positions: what is drawn when a statistic is not taken from all of them.

Both draws are without bias: a drawn example counts for those it stands for, and positions come from
a grid that is as likely as the others.
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Grid:
    """Every so many of the positions in both directions, from an offset on.

    Attributes
    ----------
    steps, offsets : (down, right). A step divides the number of positions in its direction, so that
        with an offset drawn from range(step) every position is as likely as the others.
    """

    steps: tuple
    offsets: tuple

    @property
    def slices(self):
        """Along the axes of height and width."""
        return tuple(slice(o, None, s) for o, s in zip(self.offsets, self.steps, strict=True))

    @property
    def share(self):
        """How many positions there are for each of the grid."""
        return math.prod(self.steps)


def draw_grid(height, width, wanted, generator):
    """The coarsest `Grid` with at least `wanted` of height · width positions; None for all of them.

    generator : torch.Generator (on the CPU) that draws the offset.
    """
    steps = coarsest_steps(height, width, wanted)
    if steps == (1, 1):
        return None
    return Grid(
        steps, tuple(int(torch.randint(s, (), generator=generator, device="cpu")) for s in steps)
    )


def coarsest_steps(height, width, wanted):
    """Of the coarsest grid with at least `wanted` positions; of equals the squarest."""
    grids = [
        (down, right)
        for down in _divisors(height)
        for right in _divisors(width)
        if (height // down) * (width // right) >= wanted
    ]
    return max(grids, key=lambda s: (s[0] * s[1], -max(s)), default=(1, 1))


def _divisors(number):
    return [d for d in range(1, number + 1) if number % d == 0]


def draw_examples(N, share, generator):
    """Which of N examples to take, and how many each stands for: (None, 1) for all of them.

    share : how many are wanted.   generator : torch.Generator (on the CPU).
    """
    if share is None or share >= N:
        return None, 1
    return torch.randperm(N, generator=generator, device="cpu")[:share], N / share
