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

import weakref
from contextlib import contextmanager

import torch

from tekfac_edu.optim.batch import LayerBatch


class Use:
    """One call of one layer: its input, and the gradients that came back, one per vector."""

    def __init__(self, layer, x):
        self.layer, self.x = layer, x
        self.gradients = []
        self.part = None
        # Not -1 while a checkpointed forward pass is run again inside a backward pass.
        self.surrounding_backward = torch._C._current_graph_task_id()


class Capture:
    """Collects the uses of layers between two steps.

    Parameters
    ----------
    layers : list of Layer.
    from_backward : whether ordinary backward passes count (the empirical Fisher), or only those
        inside `fisher_pass` (the other two).

    Attributes
    ----------
    wanted : set of the layers from which the next step takes statistics; assign it.
    fisher_asked : whether `accumulate_fisher` was called since the last step; it says so.
    seen : whether any of the layers was called in training mode since the last step.
    """

    def __init__(self, layers, from_backward):
        self.wanted = frozenset(layers)
        self.from_backward = from_backward
        self.uses = []
        self.fisher_passes = 0
        self.fisher_asked = self.seen = False
        self._in_fisher_pass = False
        self._canonical = {}  # part -> the part it turned out to belong to
        handles = []
        for layer in layers:
            _forget_copied_hooks(layer.module)
            hook = ForwardHook(weakref.ref(self), layer)
            handles.append(layer.module.register_forward_hook(hook, with_kwargs=True))
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
        """A dict from every layer that was used to its `LayerBatch`."""
        parts = {self._canonical[use.part] for use in self.uses}
        num_parts = len(parts) if self.from_backward else None
        by_layer = {}
        for use in self.uses:
            by_part = by_layer.setdefault(use.layer, {})
            by_part.setdefault(self._canonical[use.part], []).append(use)
        return {
            layer: LayerBatch(layer, list(by_part.values()), num_parts)
            for layer, by_part in by_layer.items()
        }


class ForwardHook:
    """What is registered on a layer's module. It knows its `Capture` weakly; a copied or pickled
    one knows none, so that a copy of the model is an ordinary model and never reports here."""

    def __init__(self, capture, layer):
        self.capture, self.layer = capture, layer

    def __call__(self, module, args, kwargs, output):
        alive, layer = self.capture(), self.layer
        if alive is None or not alive.wanted:
            return
        if not (module.training and torch.is_grad_enabled() and output.requires_grad):
            return
        alive.seen = True
        if layer not in alive.wanted:
            return
        x = args[0] if args else kwargs["input"]
        # The network's own inputs may be in a buffer that is filled again before the step.
        x = x.detach() if x.requires_grad else x.clone()
        use, capture = Use(layer, layer.batched(x)), self.capture

        def backward_hook(gradient):
            if (alive := capture()) is not None:
                alive.receive(use, layer.batched(gradient.detach()))

        output.register_hook(backward_hook)

    def __reduce__(self):
        return ForwardHook, (_nothing, None)


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
