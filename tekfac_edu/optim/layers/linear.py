"""Linear layers: T is 1 on (N, d), and the product of the axes between on (N, ..., d)."""

import math

from torch import nn
from torch.nn import functional

from tekfac_edu.optim.layers.base import Layer, scaled_to_grid


class Linear(Layer):
    """nn.Linear."""

    @staticmethod
    def accepts(module):
        return isinstance(module, nn.Linear)

    @staticmethod
    def refusal(module):
        if isinstance(module, nn.Bilinear):
            return "its output is not linear in one input"
        return None

    def batched(self, tensor):
        return tensor[None] if tensor.ndim == 1 else tensor

    def positions(self, g):
        return 1, math.prod(g.shape[1:-1])

    def inputs(self, x, grid=None):
        a = x.to(self.dtype).reshape(len(x), -1, self.module.in_features)
        a = functional.pad(a, (0, 1), value=1.0) if self.has_bias else a
        return a if grid is None else scaled_to_grid(a[:, grid.slices[1]], grid)

    def gradients(self, g, grid=None):
        g = g.to(self.dtype).reshape(len(g), -1, self.module.out_features)
        return g if grid is None else g[:, grid.slices[1]]
