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
        self.has_positions = any(whole.T > 1 for whole in self.wholes)

    def chunks(self, examples=None, rows=None, generator=None, formed=False):
        """`Chunk`s, so small that 128 MiB hold what is made of them.

        Parameters
        ----------
        examples : of how many examples, the same share of every part; None, or too many: all.
            Not along with rows.
        rows : of how many examples times positions at least, on a grid of positions that is the
            same for all examples; None, too many, or calls of unequal size: all.
        generator : torch.Generator (on the CPU) that draws examples and the grid's offset.
        formed : whether each example's own gradient matrix is to be formed, which takes room.
        """
        for whole in self.wholes:
            chunk = whole
            if rows is not None and (grids := self._grids(whole.uses, rows, generator)):
                chunk = whole.only(grids, None, 1)
            if examples is not None:
                chunk = self._drawn(whole, examples, generator)
            yield from chunk.split(formed)

    def _drawn(self, whole, examples, generator):
        """Some examples of a part; the same ones for every statistic of the step."""
        if examples not in whole.drawn:
            share = math.ceil(examples * len(whole) / self.num_examples)
            chosen, stands_for = draw_examples(len(whole), share, generator)
            few = whole if chosen is None else whole.only(None, chosen, stands_for)
            whole.drawn[examples] = few
        return whole.drawn[examples]

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
        self.kept = self.kept_gradients = None
        self.drawn = {}  # how many examples -> `Chunk` of so many

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

    def gradients(self):
        """G: (S, n, d_out, d_in); made once where that takes little room."""
        if self.kept_gradients is not None:
            return self.kept_gradients
        G = 0
        for use in self.uses:
            x, g = use.x, use.gradients
            if self.chosen is not None:
                x, g = x[self.chosen], [vector[self.chosen] for vector in g]
            G = G + self.layer.example_gradients(x, g)
        G = self.scale * G
        if G.numel() <= KEPT:
            self.kept_gradients = G
        return G

    def statistic(self, formula, *arguments):
        """A `Formula` of these examples, the cheaper of its two ways."""
        T, d_out, each_block = self.T, self.layer.d_out, self.layer.each_block
        if T == 1 or projecting_first_is_cheaper(T, d_out, self.S):
            return each_block(formula.of_rows)(*self.rows(), *arguments)
        return each_block(formula.of_gradients)(self.gradients(), *arguments)


def _joined(tensors):
    """Along the positions; as torch.cat, which copies even a single tensor: patches are large."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, -2)
