"""One step's refresh: factors, then bases, then eigenvalues in the new bases (TEKFAC Algorithm 1).

Means are over all examples of all ranks. A layer whose new statistic is not finite keeps the old
one; a layer whose decomposition fails keeps the old basis (the identity, if there is none). Either
is named in a warning, once.
"""

import torch
from torch.profiler import record_function

from tekfac_edu.optim.curvature import Decomposition
from tekfac_edu.optim.distributed import rank_in, ranks_in, received_from, sum_over_ranks
from tekfac_edu.optim.eigenbasis import DecompositionFailed
from tekfac_edu.optim.eigenvalues import MeasuredEigenvalues
from tekfac_edu.optim.schedule import shared_out
from tekfac_edu.optim.warning import warn

EXPLAINED = 0.9  # the least cosine of a gradient with the mean over examples of g aᵀ


class Sum:
    """Over this process's examples, of what a formula gives for a chunk: a named tuple of tensors.

    empty : function that makes the zeros of a process that has no examples.
    """

    def __init__(self, empty):
        self.empty, self.tensors, self.count = empty, None, 0

    def add(self, tensors, weight):
        """Of a chunk that stands for so many examples."""
        weighted = [tensor.mul_(weight) for tensor in tensors]
        if self.tensors is not None:
            weighted = [old.add_(new) for old, new in zip(self.tensors, weighted, strict=True)]
        self.tensors = tensors._make(weighted)
        self.count += weight

    @property
    def total(self):
        """The named tuple of sums."""
        return self.empty() if self.tensors is None else self.tensors


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
        self.generator = torch.Generator().manual_seed(step)

    def factors(self, layers):
        """Average in the factors of the batch."""
        rows, sums = self.settings.cost.factor_rows, []
        with record_function("tekfac_edu: statistics of factors"):
            for layer in layers:
                curvature = self.curvatures[layer]
                total = Sum(curvature.no_factors)
                for chunk in self._chunks(layer, rows=rows and rows * layer.d_in):
                    factors = layer.each_block(curvature.method.factors)(*chunk.rows())
                    total.add(factors, chunk.weight)
                sums.append(total)
            for layer, factors in self._means(layers, sums):
                self.curvatures[layer].average_factors(factors, self.settings.decay)

    def bases(self, layers):
        """Decompose the factors, each layer's on one rank."""
        layers = [layer for layer in layers if self.curvatures[layer].factors is not None]
        costs = [(layer.blocks or 1) * (layer.d_in**3 + layer.d_out**3) for layer in layers]
        owners = shared_out(costs, ranks_in(self.group))
        with record_function("tekfac_edu: eigenbases"):
            own = rank_in(self.group)
            found = [
                self._decomposed(layer) if owner == own else self.curvatures[layer].empty()
                for layer, owner in zip(layers, owners, strict=True)
            ]
            for layer, owner, decomposition in zip(layers, owners, found, strict=True):
                tensors = received_from(owner, decomposition and decomposition.tensors, self.group)
                if tensors is not None:
                    self.curvatures[layer].turn_to(Decomposition.from_tensors(tensors), self.step)

    def eigenvalues(self, layers):
        """Average in the measured eigenvalues of the batch, in the present basis."""
        examples, sums = self.settings.cost.eigenvalue_examples, []
        layers = [layer for layer in layers if self.curvatures[layer].basis is not None]
        with record_function("tekfac_edu: statistics of eigenvalues"):
            for layer in layers:
                basis = self.curvatures[layer].basis
                total = Sum(self.curvatures[layer].no_eigenvalues)
                for chunk in self._chunks(layer, examples=examples, formed=True):
                    total.add(MeasuredEigenvalues(chunk.eigenvalues(basis)), chunk.weight)
                sums.append(total)
            for layer, (D,) in self._means(layers, sums):
                self.curvatures[layer].average_eigenvalues(D, self.settings.decay, self.step)

    def _chunks(self, layer, rows=None, examples=None, formed=False):
        """This process's share of the layer's batch; rows and examples are of all ranks."""
        if layer not in self.batches:
            return []
        ranks = ranks_in(self.group)
        return self.batches[layer].chunks(
            examples and examples / ranks, rows and rows / ranks, self.generator, formed
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

    def _means(self, layers, sums):
        """(layer, mean over the examples of all ranks), where there are any and it is finite."""
        if not sums:
            return []
        totals = [each.total for each in sums]
        counts = [total[0].new_tensor(each.count) for total, each in zip(totals, sums, strict=True)]
        summed = iter(sum_over_ranks([t for total in totals for t in total], self.group))
        counts = sum_over_ranks(counts, self.group)
        means = [
            total._make(next(summed).div_(count) for _ in total)
            for total, count in zip(totals, counts, strict=True)
        ]
        finite = torch.stack([_finite(mean) for mean in means]).tolist()
        counts = torch.stack(counts).tolist()
        found = []
        for layer, mean, count, good in zip(layers, means, counts, finite, strict=True):
            if not good and count > 0:
                self._warn_once(
                    layer,
                    "statistic",
                    "its statistics are not finite; it keeps the last good ones, and does not move "
                    "while it has none",
                )
            elif count > 0:
                found.append((layer, mean))
        return found

    def _warn_once(self, layer, what, text):
        if (layer.name, what) not in self.warned:
            self.warned.add((layer.name, what))
            warn(f"{layer}: {text}")


def _finite(tensors):
    """() tensor: whether all are, in one pass over each."""
    return torch.stack([end.isfinite() for t in tensors for end in t.aminmax()]).all()


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
