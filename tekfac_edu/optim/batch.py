"""What was captured of one layer in one step, made into a, g and D, a few examples at a time.

Where only some examples or positions are wanted, they are drawn here, without bias: a drawn example
counts for those it stands for, and positions come from a grid that is as likely as the others.
"""

import math

import torch
from torch import nn

from tekfac_edu.optim.layers import (
    at_least_float32,
    layer_gradients,
    layer_inputs,
    positions_of,
)
from tekfac_edu.optim.patches import draw_grid
from tekfac_edu.optim.rescaling import (
    convolution_gradients,
    corrected_eigenvalues,
    projecting_first_is_cheaper,
    second_moments,
)

CHUNK = 2**25  # numbers in the largest array a chunk of examples may need: 128 MiB in float32


class LayerBatch:
    """One layer's a and g of one step, a few examples at a time.

    Parameters
    ----------
    module : the layer.
    parts : list over parts of a list of `Use`.
    num_parts : by how many parts each part's mean loss was divided; None if the gradients are the
        examples' own already.
    """

    def __init__(self, module, parts, num_parts):
        self.module, self.parts, self.num_parts = module, parts, num_parts
        for uses in parts:
            shapes = {(len(use.x), len(use.gradients)) for use in uses}
            if len(shapes) > 1:
                raise ValueError(
                    f"{module} was called with {sorted(n for n, _ in shapes)} "
                    f"examples within one backward pass; the first axis of its input must be the "
                    f"examples, the same in every call"
                )

    @property
    def num_examples(self):
        return sum(len(uses[0].x) for uses in self.parts)

    def chunks(self, has_bias, examples=None, rows=None, generator=None, formed=False):
        """`Examples`, so few at once that 128 MiB hold what is made of them.

        Parameters
        ----------
        has_bias : of the layer.
        formed : whether each example's own gradient matrix is to be formed, which takes room.
        examples : of how many examples, the same share of every part; None, or too many: all.
        rows : of how many examples times positions at least, on a grid of positions that is the
            same for all examples; None, too many, or calls of unequal size: all.
        generator : torch.Generator (on the CPU) that draws examples and the grid's offset.
        """
        for uses in self.parts:
            N = len(uses[0].x)
            scale = 1 if self.num_parts is None else N * self.num_parts
            share = None if examples is None else math.ceil(examples * N / self.num_examples)
            chosen, stands_for = None, 1
            if share is not None and share < N:
                order = torch.randperm(N, generator=generator, device="cpu")
                chosen, stands_for = order[:share].to(uses[0].x.device), N / share
            grids = [None for _ in uses]
            shapes = [positions_of(self.module, use.gradients[0]) for use in uses]
            if rows is not None and len(set(shapes)) == 1:  # grids of one share
                wanted = rows / self.num_examples / len(uses)
                grids = [draw_grid(*shape, wanted, generator) for shape in shapes]
            of_part = Examples(self.module, uses, scale, has_bias, grids, chosen, stands_for)
            size = max(1, CHUNK // of_part.largest(formed))
            if len(of_part) <= size:
                yield of_part
                continue
            chosen = torch.arange(N, device=uses[0].x.device) if chosen is None else chosen
            for few in chosen.split(size):
                yield Examples(self.module, uses, scale, has_bias, grids, few, stands_for)


class Examples:
    """Some examples of one part, as one layer saw them.

    Parameters
    ----------
    module : the layer.   uses : its calls, list of `Use`.   has_bias : of the layer.
    scale : what the captured gradients are multiplied with to be the examples' own.
    grids : for each use the `Grid` of positions that `pair` takes; None: all.
    chosen : (n,) int64 tensor of the examples; None: all.
    stands_for : how many examples of the part each of them counts for.
    """

    def __init__(self, module, uses, scale, has_bias, grids, chosen, stands_for):
        self.module, self.uses, self.scale, self.has_bias = module, uses, scale, has_bias
        self.grids, self.chosen, self.stands_for = grids, chosen, stands_for

    def __len__(self):
        return len(self.uses[0].x) if self.chosen is None else len(self.chosen)

    @property
    def weight(self):
        """How many examples of the batch they stand for."""
        return self.stands_for * len(self)

    @property
    def sizes(self):
        """T, of all positions, and S, d_in, d_out of the layer."""
        weight = self.module.weight
        T = sum(math.prod(positions_of(self.module, use.gradients[0])) for use in self.uses)
        return T, len(self.uses[0].gradients), weight[0].numel() + self.has_bias, len(weight)

    def largest(self, formed):
        """Numbers in the largest array per example."""
        T, S, d_in, d_out = self.sizes
        return max(T * d_in, S * T * d_out, S * d_out * d_in if formed and T > 1 else 1)

    def pair(self):
        """a: (n, T, d_in) and g: (S, n, T, d_out)."""
        a, g = [], []
        for use, grid in zip(self.uses, self.grids, strict=True):
            a.append(layer_inputs(self.module, self._of(use.x), self.has_bias, grid))
            vectors = [layer_gradients(self.module, self._of(v), grid) for v in use.gradients]
            g.append(vectors[0][None] if len(vectors) == 1 else torch.stack(vectors))
        return _joined(a, 1), self.scale * _joined(g, 2)

    def corrected_eigenvalues(self, Q_in, Q_out):
        """D of these examples in a basis, as `rescaling.corrected_eigenvalues`."""
        T, S, _, d_out = self.sizes
        if isinstance(self.module, nn.Linear) or projecting_first_is_cheaper(T, d_out, S):
            return corrected_eigenvalues(*self.pair(), Q_in, Q_out)
        of_uses = [
            convolution_gradients(
                self.module,
                at_least_float32(self._of(use.x)),
                torch.stack([at_least_float32(self._of(g)) for g in use.gradients]),
                self.has_bias,
                Q_in,
                Q_out,
            )
            for use in self.uses
        ]
        G = sum(G for G, _ in of_uses)
        return self.scale**2 * second_moments(G, of_uses[0][1])

    def _of(self, tensor):
        return tensor if self.chosen is None else tensor[self.chosen]


def _joined(tensors, axis):
    """As torch.cat, which copies even a single tensor; patches are large."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, axis)
