"""Convolutions of one and two dimensions: T counts output positions, d_in = C_in · kernel elements.

In groups a convolution is block-diagonal: group b maps its C_in / B channels to its C_out / B, so
each has factors of its own; depthwise (B = C_in), of size kernel elements by one.
"""

import torch
from torch import nn
from torch.nn import functional

from tekfac_edu.optim.layers.base import Layer, scaled_to_grid
from tekfac_edu.optim.layers.patches import kernel_rows, patches, rows_of_basis


class Convolution(Layer):
    """nn.Conv1d and nn.Conv2d."""

    is_convolution = True

    @staticmethod
    def accepts(module):
        return isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == 1

    @staticmethod
    def refusal(module):
        if isinstance(module, nn.modules.conv._ConvNd):
            known = isinstance(module, nn.Conv1d | nn.Conv2d)
            return None if known else "of the convolutions, Conv1d and Conv2d are factored"
        return None

    def batched(self, tensor):
        return tensor[None] if tensor.ndim == len(self.module.kernel_size) + 1 else tensor

    def positions(self, g):
        return (1, *g.shape[2:]) if isinstance(self.module, nn.Conv1d) else (*g.shape[2:],)

    def inputs(self, x, grid=None):
        a = patches(self.module, scaled_to_grid(x.to(self.dtype), grid), grid)
        one = 1.0 if grid is None else grid.share**0.5
        return functional.pad(a, (0, 1), value=one) if self.has_bias else a

    def gradients(self, g, grid=None):
        g = g.to(self.dtype)
        g = g[:, :, None] if isinstance(self.module, nn.Conv1d) else g
        g = g if grid is None else g[:, :, *grid.slices]
        return g.flatten(2).mT

    def turned_gradients(self, x, g, Q_in, Q_out):
        """Formed kernel row by kernel row, without patches; columns as in `kernel_rows`."""
        g = Q_out.mT @ g.to(self.dtype).flatten(3)
        G = [g @ row.mT for row in kernel_rows(self.module, x.to(self.dtype))]
        rows = rows_of_basis(self.module, Q_in)
        if self.has_bias:
            G.append(g.sum(3, keepdim=True))
            rows.append(Q_in[-1:])
        return torch.cat(G, 3), torch.cat(rows)


class GroupedConvolution(Convolution):
    """The same with groups > 1: one block per group."""

    turned_gradients = Layer.turned_gradients

    @staticmethod
    def accepts(module):
        return isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups > 1

    @staticmethod
    def blocks_of(module):
        return module.groups

    def inputs(self, x, grid=None):
        a = patches(self.module, scaled_to_grid(x.to(self.dtype), grid), grid)
        a = a.unflatten(2, (self.blocks, -1)).permute(2, 0, 1, 3)
        one = 1.0 if grid is None else grid.share**0.5
        return functional.pad(a, (0, 1), value=one) if self.has_bias else a

    def gradients(self, g, grid=None):
        g = super().gradients(g, grid)
        return g.unflatten(2, (self.blocks, -1)).permute(2, 0, 1, 3)
