"""What one layer saw in one step, made into a, g and eigenvalues, a chunk of examples at a time.

A *use* is one call of the module; a *part* is what one backward pass reaches, a list of uses; a
*batch* is all examples of a step; a *chunk* is so many of them that the arrays made of them fit.
"""

import math

import torch

from tekfac_edu.optim.eigenvalues import projecting_first_is_cheaper
from tekfac_edu.optim.sampling import draw_examples, draw_grid

CHUNK = 2**25  # numbers in the largest array a chunk of examples may need: 128 MiB in float32
KEPT = 2**22  # numbers in a and g of a whole part that are kept for the step's second statistic


class LayerBatch:
    """One layer's a and g of one step.

    Parameters
    ----------
    layer : Layer.
    parts : list over parts of a list of `Use`.
    num_parts : by how many parts each part's mean loss was divided; None if the gradients are the
        examples' own already.
    """

    def __init__(self, layer, parts, num_parts):
        self.layer = layer
        self.wholes = []  # of every part the `Chunk` of all its examples and positions
        for uses in parts:
            shapes = {(len(use.x), len(use.gradients)) for use in uses}
            if len(shapes) > 1:
                raise ValueError(
                    f"{layer.module} was called with {sorted(n for n, _ in shapes)} "
                    f"examples within one backward pass; the first axis of its input must be the "
                    f"examples, the same in every call"
                )
            scale = 1 if num_parts is None else len(uses[0].x) * num_parts
            self.wholes.append(Chunk(layer, uses, scale))
        self.num_examples = sum(map(len, self.wholes))

    def chunks(self, examples=None, rows=None, generator=None, formed=False):
        """`Chunk`s, so small that 128 MiB hold what is made of them.

        Parameters
        ----------
        examples : of how many examples, the same share of every part; None, or too many: all.
        rows : of how many examples times positions at least, on a grid of positions that is the
            same for all examples; None, too many, or calls of unequal size: all.
        generator : torch.Generator (on the CPU) that draws examples and the grid's offset.
        formed : whether each example's own gradient matrix is to be formed, which takes room.
        """
        for whole in self.wholes:
            chosen, stands_for, grids = None, 1, None
            if examples is not None:
                share = math.ceil(examples * len(whole) / self.num_examples)
                chosen, stands_for = draw_examples(len(whole), share, generator)
            if rows is not None:
                grids = self._grids(whole.uses, rows, generator)
            drawn = chosen is not None or grids is not None
            chunk = whole.only(grids, chosen, stands_for) if drawn else whole
            yield from chunk.split(formed)

    def _grids(self, uses, rows, generator):
        """For each use a `Grid` of positions, all of one share; None for all positions."""
        shapes = [self.layer.positions(use.gradients[0]) for use in uses]
        if len(set(shapes)) > 1:
            return None
        wanted = rows / self.num_examples / len(uses)
        grids = [draw_grid(height, width, wanted, generator) for height, width in shapes]
        return grids if any(grids) else None


class Chunk:
    """Some examples of one part, as one layer saw them.

    Parameters
    ----------
    layer : Layer.   uses : its calls, list of `Use`.
    scale : what the captured gradients are multiplied with to be the examples' own.
    grids : for each use the `Grid` of positions that a and g have, or None; None: all.
    chosen : (n,) int64 tensor of the examples; None: all.
    stands_for : how many examples of the part each of them counts for.

    Attributes
    ----------
    T : positions per example, all uses together, whatever the grids.   S : vectors per example.
    weight : how many examples of the batch they stand for.
    """

    def __init__(self, layer, uses, scale, grids=None, chosen=None, stands_for=1):
        self.layer, self.uses, self.scale = layer, uses, scale
        self.grids = grids or len(uses) * [None]
        self.chosen, self.stands_for = chosen, stands_for
        self.T = sum(math.prod(layer.positions(use.gradients[0])) for use in uses)
        self.S = len(uses[0].gradients)
        self.weight = stands_for * len(self)
        self.kept = None

    def __len__(self):
        return len(self.uses[0].x) if self.chosen is None else len(self.chosen)

    def only(self, grids, chosen, stands_for):
        """The same with only these positions and examples."""
        chosen = None if chosen is None else chosen.to(self.uses[0].x.device)
        return Chunk(self.layer, self.uses, self.scale, grids, chosen, stands_for)

    def split(self, formed):
        """Itself, or smaller chunks: as few as `CHUNK` allows."""
        T, S, d_in, d_out = self.T, self.S, self.layer.d_in, self.layer.d_out
        gradients = S * d_out * d_in if formed and T > 1 else 1
        largest = (self.layer.blocks or 1) * max(T * d_in, S * T * d_out, gradients)
        size = max(1, CHUNK // largest)
        if len(self) <= size:
            return [self]
        device = self.uses[0].x.device
        chosen = torch.arange(len(self), device=device) if self.chosen is None else self.chosen
        return [self.only(self.grids, few, self.stands_for) for few in chosen.split(size)]

    def rows(self):
        """a: (n, T, d_in) and g: (S, n, T, d_out); made once where that takes little room."""
        if self.kept is not None:
            return self.kept
        of_uses = map(self._rows_of_use, self.uses, self.grids)
        a, g = map(_joined, zip(*of_uses, strict=True))
        g = self.scale * g
        if a.numel() + g.numel() <= KEPT:
            self.kept = a, g
        return a, g

    def _rows_of_use(self, use, grid):
        x, vectors = use.x, use.gradients
        if self.chosen is not None:
            x, vectors = x[self.chosen], [v[self.chosen] for v in vectors]
        g = [self.layer.gradients(vector, grid) for vector in vectors]
        g = g[0].unsqueeze(-4) if len(g) == 1 else torch.stack(g, -4)
        return self.layer.inputs(x, grid), g

    def eigenvalues(self, basis):
        """Their corrected eigenvalues in a basis, the cheaper of the two ways."""
        layer = self.layer
        if self.T == 1 or projecting_first_is_cheaper(self.T, layer.d_out, self.S):
            return layer.each_block(basis.corrected_eigenvalues)(*self.rows(), *basis)
        G = 0
        for use in self.uses:
            x, g = use.x, torch.stack(use.gradients)
            if self.chosen is not None:
                x, g = x[self.chosen], g[:, self.chosen]
            formed, Q_in = layer.turned_gradients(x, g, *basis)
            G = G + formed
        return self.scale**2 * layer.each_block(basis.second_moments)(G, Q_in)


def _joined(tensors):
    """Along the positions; as torch.cat, which copies even a single tensor: patches are large."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, -2)
