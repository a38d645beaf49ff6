"""From a step's captured batch to new factors, bases and eigenvalues, on one process or on many.

Means are over all examples of all ranks. A layer whose new statistic is not finite keeps the old
one; a layer whose decomposition fails keeps the old basis (the identity, if there is none). Either
is named in a warning, once.
"""

from functools import partial

import torch

from tekfac_edu.optim.distributed import rank_in, ranks_in, received_from, sum_over_ranks
from tekfac_edu.optim.eigenbasis import DecompositionFailed
from tekfac_edu.optim.factors import factors_from
from tekfac_edu.optim.turns import shared_out
from tekfac_edu.optim.warning import warn

EXPLAINED = 0.9  # the least cosine of a gradient with the mean over examples of g aᵀ


class Refresh:
    """One step's refresh of all layers.

    Parameters
    ----------
    curvatures : dict Layer -> LayerCurvature.
    batches : dict module -> LayerBatch, of this process.
    group : ranks to average over, or None.
    warned : set, of what has been warned of; it grows.
    """

    def __init__(self, curvatures, batches, group, warned):
        self.curvatures, self.batches, self.group = curvatures, batches, group
        self.warned = warned

    def factors(self, layers, estimate, decay, rows=None, generator=None):
        """Average in the factors of the batch.

        rows : per number in a layer's input, of how many examples times positions; None: of all.
        generator : draws the positions.
        """

        def chunks(layer, batch):
            wanted = None if rows is None else rows * layer.d_in / ranks_in(self.group)
            return batch.chunks(layer.has_bias, rows=wanted, generator=generator)

        def of(layer, examples):
            return vars(estimate(*examples.pair()))

        def none(layer, zeros):
            return vars(estimate(zeros(1, layer.d_in), zeros(1, layer.d_out)))

        for layer, fields in self._means(layers, chunks, of, none).items():
            self.curvatures[layer].average_factors(factors_from(fields), decay)

    def eigenvalues(self, layers, decay, step, examples=None, generator=None):
        """Average in the measured eigenvalues of the batch, in the present basis.

        examples : of how many examples, of all ranks together; None: of all.
        generator : draws them.
        """

        def chunks(layer, batch):
            wanted = None if examples is None else examples / ranks_in(self.group)
            how = {"examples": wanted, "generator": generator, "formed": True}
            return batch.chunks(layer.has_bias, **how)

        def of(layer, few):
            curvature = self.curvatures[layer]
            return {"D": few.corrected_eigenvalues(curvature.Q_in, curvature.Q_out)}

        def none(layer, zeros):
            return {"D": zeros(layer.d_out, layer.d_in)}

        layers = [layer for layer in layers if self.curvatures[layer].Q_in is not None]
        for layer, fields in self._means(layers, chunks, of, none).items():
            self.curvatures[layer].average_eigenvalues(fields["D"], decay, step)

    def bases(self, layers, step):
        """Decompose the factors, each layer's on one rank."""
        layers = [layer for layer in layers if self.curvatures[layer].factors is not None]
        costs = [layer.d_in**3 + layer.d_out**3 for layer in layers]
        owners = shared_out(costs, ranks_in(self.group))
        mine = rank_in(self.group)
        bases = [
            self._basis(layer) if owner == mine else self.curvatures[layer].empty_basis()
            for layer, owner in zip(layers, owners, strict=True)
        ]
        for layer, owner, basis in zip(layers, owners, bases, strict=True):
            basis = received_from(owner, basis, self.group)
            if basis is not None:
                self.curvatures[layer].turn_to(basis, step)

    def _basis(self, layer):
        """A new basis; None if the old one has to be kept."""
        curvature = self.curvatures[layer]
        try:
            return curvature.decompose()
        except DecompositionFailed as error:
            self._warn_once(
                layer,
                "basis",
                f"the eigendecomposition of its factors failed; it keeps its last basis ({error})",
            )
            return None if curvature.ready else curvature.identity_basis()

    def _means(self, layers, chunks, of, none):
        """For each layer the mean over examples of the tensors that `of(layer, examples)` gives.

        chunks : function of layer and batch to `Examples`.
        none : function of layer and a maker of zeros, to what a rank without examples gives.
        Layers that no rank has used, or whose mean is not finite, are left out.
        """
        sums = [self._sum(layer, chunks, of, none) for layer in layers]
        flat = sum_over_ranks([t for _, total in sums for t in total.values()], self.group)
        counts = sum_over_ranks([count for count, _ in sums], self.group)
        means, start = {}, 0
        for layer, count, (_, total) in zip(layers, counts, sums, strict=True):
            tensors = flat[start : start + len(total)]
            start += len(total)
            means[layer] = {k: t.div_(count) for k, t in zip(total, tensors, strict=True)}
        if not means:
            return {}
        finite = [  # as isfinite().all(), in one pass
            torch.stack([end.isfinite() for t in fields.values() for end in t.aminmax()]).all()
            for fields in means.values()
        ]
        finite = torch.stack(finite).tolist()
        used = torch.stack(counts).gt(0).tolist()
        result = {}
        for (layer, fields), layer_finite, layer_used in zip(
            means.items(), finite, used, strict=True
        ):
            if layer_used and layer_finite:
                result[layer] = fields
            elif layer_used:
                self._warn_once(
                    layer,
                    "statistic",
                    "its statistics are not finite; it keeps the last good ones, and does not move "
                    "while it has none",
                )
        return result

    def _sum(self, layer, chunks, of, none):
        """This process's number of examples, and the sums over them; zeros if it has none."""
        batch = self.batches.get(layer.module)
        weight = layer.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        count, total = 0, None
        if batch is None:
            total = none(layer, partial(torch.zeros, dtype=dtype, device=weight.device))
        else:
            for examples in chunks(layer, batch):
                new = {k: t.mul_(examples.weight) for k, t in of(layer, examples).items()}
                total = new if total is None else {k: t.add_(new[k]) for k, t in total.items()}
                count += examples.weight
        return torch.tensor(float(count), dtype=dtype, device=weight.device), total

    def _warn_once(self, layer, what, text):
        if (layer.name, what) not in self.warned:
            self.warned.add((layer.name, what))
            warn(f"{layer}: {text}")


def warn_if_examples_differ(layers, batches):
    """Warn if layers disagree about the number of examples: one has positions in its first axis."""
    counts = {str(layer): batches[layer.module].num_examples for layer in layers}
    if len(set(counts.values())) > 1:
        few, many = min(counts, key=counts.get), max(counts, key=counts.get)
        warn(
            f"{few} saw {counts[few]} examples and {many} saw {counts[many]}. The first axis of a "
            f"layer's input must be the examples; with positions folded into it, the curvature has "
            f"the wrong scale"
        )


def warn_unless_explained(layer, batch, M):
    """Warn if M is not, up to its length, the mean over examples of g āᵀ that was captured."""
    mean = sum(
        g.sum(0).flatten(0, 1).T @ a.flatten(0, 1)
        for a, g in (examples.pair() for examples in batch.chunks(layer.has_bias))
    )
    norms = M.norm() * mean.norm()
    cosine = ((M * mean).sum() / norms).item() if norms > 0 else 1.0
    if cosine < EXPLAINED:
        warn(
            f"{layer}: its gradient is not the mean of its examples' gradients (cosine "
            f"{cosine:.2f}), so the curvature is of something else. Is the first axis of its input "
            f"the examples, and is its weight used in its own forward only?"
        )
