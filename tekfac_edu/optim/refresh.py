"""One step's refresh: factors, then bases, then eigenvalues in the new bases (TEKFAC Algorithm 1).

Means are over all examples of all ranks. A layer whose new statistic is not finite keeps the old
one; a layer whose decomposition fails keeps the old basis (the identity, if there is none). Either
is named in a warning, once.
"""

import torch
from torch.profiler import record_function

from tekfac_edu.optim.curvature import Decomposition
from tekfac_edu.optim.distributed import (
    rank_in,
    ranks_in,
    ranks_of,
    received_from,
    sum_over_ranks,
)
from tekfac_edu.optim.eigenbasis import DecompositionFailed
from tekfac_edu.optim.eigenvalues import MeasuredEigenvalues
from tekfac_edu.optim.refusals import refuse_missing_statistics
from tekfac_edu.optim.schedule import shared_out
from tekfac_edu.optim.warning import warn

EXPLAINED = 0.9  # the least cosine of a gradient with the mean over examples of g aᵀ


def refresh(optimizer, gradients):
    """What this step refreshes: statistics, then eigenbases, then eigenvalues in the new basis.

    gradients : {Layer: M}.

    Raises
    ------
    RuntimeError
        If statistics are due and none were captured.
    """
    batches, curvatures = optimizer.capture.batches(), optimizer.curvatures
    refuse_missing_statistics(optimizer, gradients, batches)
    group, settings = ranks_of(optimizer.process_group), optimizer.settings
    fresh = [layer for layer in gradients if layer in batches and not curvatures[layer].ready]
    warn_if_examples_differ(fresh, batches)
    if settings.fisher == "empirical" and group is None:
        for layer in fresh:
            warn_unless_explained(layer, batches[layer], gradients[layer])
    stages = Refresh(curvatures, batches, settings, optimizer.steps, group, optimizer.warned)
    for stage in (stages.factors, stages.bases, stages.eigenvalues):
        if due := optimizer.schedule.due(stage.__name__, optimizer.steps, curvatures):
            stage(due)


class Refresh:
    """One step's refresh of all layers.

    Parameters
    ----------
    curvatures : dict Layer -> LayerCurvature.
    batches : dict Layer -> LayerBatch, of this process.
    settings : Settings.
    step : its number; random draws depend on it alone, and are the same on all ranks.
    group : ranks to average over, or None.
    warned : set, of what has been warned of; it grows.
    """

    def __init__(self, curvatures, batches, settings, step, group, warned):
        self.curvatures, self.batches, self.settings = curvatures, batches, settings
        self.step, self.group, self.warned = step, group, warned
        self.ranks = ranks_in(group)
        self.generator = torch.Generator().manual_seed(step)

    def factors(self, layers):
        """Average in the factors of the batch."""
        rows, sums = self.settings.cost.factor_rows, {}
        with record_function("tekfac_edu: statistics of factors"):
            for layer in layers:
                curvature, count, total = self.curvatures[layer], 0, None
                for chunk in self._chunks(layer, rows=rows and rows * layer.d_in):
                    factors = layer.each_block(curvature.method.factors)(*chunk.rows())
                    total = added(total, factors, chunk.weight)
                    count += chunk.weight
                sums[layer] = count, total or curvature.no_factors()
            for layer, factors in self._means(sums):
                self.curvatures[layer].average_factors(factors, self.settings.decay)

    def bases(self, layers):
        """Decompose the factors, each layer's on one rank."""
        layers = [layer for layer in layers if self.curvatures[layer].factors is not None]
        costs = [(layer.blocks or 1) * (layer.d_in**3 + layer.d_out**3) for layer in layers]
        owners, own = shared_out(costs, self.ranks), rank_in(self.group)
        with record_function("tekfac_edu: eigenbases"):
            found = [
                self._decomposed(layer) if owner == own else self.curvatures[layer].empty()
                for layer, owner in zip(layers, owners, strict=True)
            ]
            for layer, owner, decomposition in zip(layers, owners, found, strict=True):
                if self.group is not None:
                    decomposition = self._sent(decomposition, owner)
                if decomposition is not None:
                    self.curvatures[layer].turn_to(decomposition, self.step)

    def _sent(self, decomposition, owner):
        """The owner's, on all ranks."""
        tensors = received_from(owner, decomposition and decomposition.tensors, self.group)
        return tensors and Decomposition.from_tensors(tensors)

    def eigenvalues(self, layers):
        """Average in the measured eigenvalues of the batch, in the present basis."""
        examples, sums = self.settings.cost.eigenvalue_examples, {}
        with record_function("tekfac_edu: statistics of eigenvalues"):
            for layer in layers:
                curvature, count, total = self.curvatures[layer], 0, None
                if curvature.basis is None:
                    continue
                for chunk in self._chunks(layer, examples=examples, formed=True):
                    measured = MeasuredEigenvalues(chunk.eigenvalues(curvature.basis))
                    total = added(total, measured, chunk.weight)
                    count += chunk.weight
                sums[layer] = count, total or curvature.no_eigenvalues()
            for layer, (D,) in self._means(sums):
                self.curvatures[layer].average_eigenvalues(D, self.settings.decay, self.step)

    def _chunks(self, layer, rows=None, examples=None, formed=False):
        """This process's share of the layer's batch; rows and examples are of all ranks."""
        if layer not in self.batches:
            return []
        return self.batches[layer].chunks(
            examples and examples / self.ranks, rows and rows / self.ranks, self.generator, formed
        )

    def _decomposed(self, layer):
        """A new `Decomposition`; None if the old basis has to be kept."""
        curvature = self.curvatures[layer]
        try:
            return curvature.decompose()
        except DecompositionFailed as error:
            self._warn_once(
                layer,
                "basis",
                f"the eigendecomposition of its factors failed; it keeps its last basis ({error})",
            )
            return None if curvature.ready else curvature.identity()

    def _means(self, sums):
        """(layer, mean over the examples of all ranks), where there are any and it is finite.

        sums : {layer: (number of examples, named tuple of sums over them)}, of this process.
        """
        if not sums:
            return
        flat = [tensor for _, total in sums.values() for tensor in total]
        counts = [total[0].new_tensor(float(count)) for count, total in sums.values()]
        flat, counts = sum_over_ranks(flat, self.group), sum_over_ranks(counts, self.group)
        finite = torch.stack(torch._foreach_norm(flat, torch.inf)).isfinite().tolist()
        used = torch.stack(counts).gt(0).tolist()
        start = 0
        for (layer, (_, total)), count, seen in zip(sums.items(), counts, used, strict=True):
            end = start + len(total)
            if seen and all(finite[start:end]):
                yield layer, total._make(torch._foreach_div(flat[start:end], count))
            elif seen:
                self._warn_once(
                    layer,
                    "statistic",
                    "its statistics are not finite; it keeps the last good ones, and does not move "
                    "while it has none",
                )
            start = end

    def _warn_once(self, layer, what, text):
        if (layer.name, what) not in self.warned:
            self.warned.add((layer.name, what))
            warn(f"{layer}: {text}")


def added(total, new, weight):
    """total + weight · new, named tuples of tensors, in place; None counts as zero."""
    torch._foreach_mul_(new, weight)
    if total is None:
        return new
    torch._foreach_add_(total, new)
    return total


def warn_if_examples_differ(layers, batches):
    """Warn if layers disagree about the number of examples: one has positions in its first axis."""
    counts = {str(layer): batches[layer].num_examples for layer in layers}
    if len(set(counts.values())) > 1:
        few, many = min(counts, key=counts.get), max(counts, key=counts.get)
        warn(
            f"{few} saw {counts[few]} examples and {many} saw {counts[many]}. The first axis of a "
            f"layer's input must be the examples; with positions folded into it, the curvature has "
            f"the wrong scale"
        )


def warn_unless_explained(layer, batch, M):
    """Warn if M is not, up to its length, the mean over examples of g āᵀ that was captured."""
    product = layer.each_block(lambda a, g: g.sum(0).flatten(0, 1).T @ a.flatten(0, 1))
    mean = sum(product(*chunk.rows()) for chunk in batch.chunks())
    norms = M.norm() * mean.norm()
    cosine = ((M * mean).sum() / norms).item() if norms > 0 else 1.0
    if cosine < EXPLAINED:
        warn(
            f"{layer}: its gradient is not the mean of its examples' gradients (cosine "
            f"{cosine:.2f}), so the curvature is of something else. Is the first axis of its input "
            f"the examples, and is its weight used in its own forward only?"
        )
