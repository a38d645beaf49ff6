"""What layers saw and what came back, from hooks on ordinary forward and backward passes.

A forward pass in training mode leaves a hook on each factored layer's output. When a gradient
arrives there, input and gradient are kept until the step. Nothing is kept on steps that take no
statistics, under `eval()`, or under `no_grad()`.

What belongs together is read off the backward passes. Uses of a module that one `backward()`
reaches are positions of the same examples (a module called twice in a forward pass). Separate
`backward()` calls are parts of one larger batch, each loss divided by their number, as gradient
accumulation has it. A use that a second `backward()` reaches (two losses on one forward pass) gets
the sum, and the two calls count as one. The mean loss's 1/N and the division by parts are undone:

    g_n = (examples in the part) · (parts) · (what autograd has at the layer's output)
"""

import math
import weakref
from contextlib import contextmanager

import torch
from torch import nn

from tekfac_edu.optim.layers import (
    at_least_float32,
    batched,
    layer_gradients,
    layer_inputs,
    positions_of,
)
from tekfac_edu.optim.patches import draw_grid
from tekfac_edu.optim.rescaling import (
    convolution_gradients,
    corrected_eigenvalues,
    projecting_first_is_cheaper,
)

CHUNK = 2**25  # numbers in the largest array a chunk of examples may need: 128 MiB in float32


class Use:
    """One call of one module: its input, and the gradients that came back, one per vector."""

    def __init__(self, module, x):
        self.module, self.x = module, x
        self.gradients = []
        self.part = None
        # Not -1 while a checkpointed forward pass is run again inside a backward pass.
        self.surrounding_backward = torch._C._current_graph_task_id()


class Capture:
    """Collects the uses of modules between two steps.

    Parameters
    ----------
    modules : the factored modules.
    from_backward : whether ordinary backward passes count (the empirical Fisher), or only those
        inside `fisher_pass` (the other two).

    Attributes
    ----------
    wanted : set of the modules from which the next step takes statistics; assign it.
    fisher_asked : whether `accumulate_fisher` was called since the last step; it says so.
    seen : whether any of the modules was called in training mode since the last step.
    """

    def __init__(self, modules, from_backward):
        self.wanted = frozenset(modules)
        self.from_backward = from_backward
        self.uses = []
        self.fisher_passes = 0
        self.fisher_asked = self.seen = False
        self._in_fisher_pass = False
        self._canonical = {}  # part -> the part it turned out to belong to
        for module in modules:
            _forget_copied_hooks(module)
        hook = ForwardHook(weakref.ref(self))
        handles = [m.register_forward_hook(hook, with_kwargs=True) for m in modules]
        weakref.finalize(self, _remove, handles)

    def clear(self):
        """Forget everything captured."""
        self.uses, self._canonical, self.fisher_passes = [], {}, 0
        self.fisher_asked = self.seen = False

    @contextmanager
    def fisher_pass(self):
        """Backward passes inside are vectors of the same examples, with gradients as they are."""
        self._in_fisher_pass = True
        try:
            yield
        finally:
            self._in_fisher_pass = False
            self.fisher_passes += 1

    def receive(self, use, gradient):
        """A gradient arrived at the output of a use."""
        if self._in_fisher_pass:
            part = -1 - self.fisher_passes
        elif not self.from_backward or torch.is_grad_enabled():
            return  # gradients of gradients (create_graph=True) are not of the examples' losses
        elif use.surrounding_backward != -1:
            part = use.surrounding_backward
        else:
            part = torch._C._current_graph_task_id()
        part = self._canonical.setdefault(part, part)
        if use.part is None:
            use.part = part
            use.gradients = [gradient]
            self.uses.append(use)
        elif self._in_fisher_pass:
            use.gradients.append(gradient)
        else:
            use.gradients = [use.gradients[0] + gradient]
            for key, value in self._canonical.items():
                if value == part:
                    self._canonical[key] = self._canonical[use.part]

    def batches(self):
        """A dict from every module that was used to its `LayerBatch`."""
        parts = {self._canonical[use.part] for use in self.uses}
        scale = len(parts) if self.from_backward else None
        by_module = {}
        for use in self.uses:
            by_part = by_module.setdefault(use.module, {})
            by_part.setdefault(self._canonical[use.part], []).append(use)
        return {m: LayerBatch(m, list(by_part.values()), scale) for m, by_part in by_module.items()}


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

    def chunks(self, has_bias, examples=None, rows=None, generator=None):
        """`Examples`, so few at once that 128 MiB hold what is made of them.

        Parameters
        ----------
        has_bias : of the layer.
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
            size = max(1, CHUNK // of_part.largest)
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

    @property
    def largest(self):
        """Numbers in the largest array per example."""
        T, S, d_in, d_out = self.sizes
        return max(T * d_in, S * T * d_out, S * d_out * d_in if T > 1 else 1)

    def pair(self):
        """a: (n, T, d_in) and g: (S, n, T, d_out)."""
        a, g = [], []
        for use, grid in zip(self.uses, self.grids, strict=True):
            a.append(layer_inputs(self.module, self._of(use.x), self.has_bias, grid))
            vectors = [layer_gradients(self.module, self._of(v), grid) for v in use.gradients]
            g.append(vectors[0][None] if len(vectors) == 1 else torch.stack(vectors))
        return _joined(a, 1), self.scale * _joined(g, 2)

    def corrected_eigenvalues(self, Q_in, Q_out):
        """D of these examples in a basis, as `rescaling.corrected_eigenvalues`; (d_out, d_in)."""
        T, S, _, d_out = self.sizes
        if isinstance(self.module, nn.Linear) or projecting_first_is_cheaper(T, d_out, S):
            return corrected_eigenvalues(*self.pair(), Q_in, Q_out)
        G = sum(
            convolution_gradients(
                self.module,
                at_least_float32(self._of(use.x)),
                torch.stack([at_least_float32(self._of(g)) for g in use.gradients]),
                self.has_bias,
                Q_in,
                Q_out,
            )
            for use in self.uses
        )
        return self.scale**2 * G.square().sum((0, 1)) / len(self)

    def _of(self, tensor):
        return tensor if self.chosen is None else tensor[self.chosen]


def _joined(tensors, axis):
    """As torch.cat, which copies even a single tensor; patches are large."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, axis)


class ForwardHook:
    """What is registered on a module. It knows its `Capture` weakly; a copied or pickled one knows
    none, so that a copy of the model is an ordinary model and never reports to this optimizer."""

    def __init__(self, capture):
        self.capture = capture

    def __call__(self, module, args, kwargs, output):
        alive = self.capture()
        if alive is None or not alive.wanted:
            return
        if not (module.training and torch.is_grad_enabled() and output.requires_grad):
            return
        alive.seen = True
        if module not in alive.wanted:
            return
        x = args[0] if args else kwargs["input"]
        # The network's own inputs may be in a buffer that is filled again before the step.
        x = x.detach() if x.requires_grad else x.clone()
        use, capture = Use(module, batched(module, x)), self.capture

        def backward_hook(gradient):
            if (alive := capture()) is not None:
                alive.receive(use, batched(module, gradient.detach()))

        output.register_hook(backward_hook)

    def __reduce__(self):
        return ForwardHook, (_nothing,)


def _nothing():
    return None


def _forget_copied_hooks(module):
    """A copied model carries copies of hooks, which know no `Capture`."""
    hooks = module._forward_hooks
    for key in [k for k, h in hooks.items() if isinstance(h, ForwardHook) and h.capture() is None]:
        del hooks[key]
        module._forward_hooks_with_kwargs.pop(key, None)


def _remove(handles):
    for handle in handles:
        handle.remove()
