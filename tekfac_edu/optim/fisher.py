"""Which vectors the outputs send back: the three Fishers' choices (chapter 2).

    likelihood      exact                                 mc
    categorical     √p_c (p − e_c) for every class c      p − e_ŷ,  ŷ ~ p
    bernoulli       √(p_c (1 − p_c)) e_c, every output    p − ŷ,    ŷ_c ~ p_c, independent
    gaussian        e_c for every output c                ε ~ N(0, I)

each the gradient, with respect to the outputs z of an example, of its own −log p(y|z) for that y.
The empirical Fisher's vectors are those of the ordinary backward pass.
"""

import numpy as np
import torch

from tekfac_edu.arguments import one_of
from tekfac_edu.optim.distributed import rank_in, ranks_of

LIKELIHOODS = ("categorical", "bernoulli", "gaussian")


def fisher_vectors(outputs, likelihood, exact, generator):
    """Yield the vectors, each (N, C), in the outputs' dtype.

    Parameters
    ----------
    outputs : (N, C) tensor: logits, or the mean of a Gaussian of unit variance.
    likelihood : one of LIKELIHOODS.
    exact : every class (or output), or else one sample per example.
    generator : torch.Generator that samples.
    """
    z = outputs.detach()
    z = z if z.dtype == torch.float64 else z.float()
    vectors = _of_every_output(z, likelihood) if exact else [_sampled(z, likelihood, generator)]
    for vector in vectors:
        yield vector.to(outputs.dtype)


def _of_every_output(z, likelihood):
    N, C = z.shape
    one_hot = torch.eye(C, dtype=z.dtype, device=z.device)
    if likelihood == "categorical":
        p = z.softmax(1)
        return (p[:, c, None].sqrt() * (p - one_hot[c]) for c in range(C))
    if likelihood == "bernoulli":
        deviation = (z.sigmoid() * (-z).sigmoid()).sqrt()
        return (deviation * one_hot[c] for c in range(C))
    return (one_hot[c].expand(N, C) for c in range(C))


def _sampled(z, likelihood, generator):
    # Outputs that are not finite give vectors that are not, and statistics that say so.
    if likelihood == "categorical":
        p = z.softmax(1)
        label = torch.multinomial(p.nan_to_num(nan=1.0), 1, generator=generator)
        return p.scatter_add(1, label, torch.full_like(p[:, :1], -1.0))
    if likelihood == "bernoulli":
        p = z.sigmoid()
        return p - torch.bernoulli(p.nan_to_num(nan=0.5), generator=generator)
    return torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator)


def accumulate_fisher(optimizer, outputs, likelihood="categorical"):
    """Send the model's own distribution back, for fisher="mc" or "exact"; leaves .grad alone.

    Call it after zero_grad, between the forward and the backward pass, once for each part of a
    batch. On steps that take no statistics it does nothing.

    Parameters
    ----------
    outputs : (N, C) tensor, what the model returned: logits, or the mean of a Gaussian.
    likelihood : "categorical" (cross-entropy), "bernoulli" (binary cross-entropy, summed over
        outputs), or "gaussian" of unit variance (half the squared error, summed over outputs).

    Raises
    ------
    ValueError, RuntimeError
        If outputs are not (N, C) or come from no factored module in training mode; under
        fisher="empirical".
    """
    one_of("likelihood", likelihood, LIKELIHOODS)
    settings, capture = optimizer.settings, optimizer.capture
    if settings.fisher == "empirical":
        raise RuntimeError(
            'accumulate_fisher is for fisher="mc" or "exact"; this optimizer has '
            'fisher="empirical", which takes its statistics from loss.backward()'
        )
    if outputs.ndim != 2:
        raise ValueError(f"outputs must be (N, C); their shape is {(*outputs.shape,)}")
    if not outputs.requires_grad:
        raise RuntimeError("outputs have no graph: call accumulate_fisher before backward()")
    capture.fisher_asked = True
    weights = [
        layer.weight
        for layer in optimizer.layers
        if layer in capture.wanted and layer.weight.requires_grad
    ]
    if not weights:
        return
    before = len(capture.uses)
    rank = rank_in(ranks_of(optimizer.process_group))
    draw = sampler(settings.seed, optimizer.steps, capture.fisher_passes, rank, outputs.device)
    vectors = fisher_vectors(outputs, likelihood, settings.fisher == "exact", draw)
    with capture.fisher_pass():
        for vector in vectors:
            send_back(outputs, weights, vector)
    all_wanted = len(capture.wanted) == len(optimizer.layers)
    if len(capture.uses) == before and (all_wanted or not capture.seen):
        raise RuntimeError(
            "outputs come from no factored module in training mode, or have been used already"
        )


def sampler(seed, step, part, rank, device):
    """torch.Generator of the samples of one part of one step's batch on one rank."""
    (word,) = np.random.SeedSequence([seed, step, part, rank]).generate_state(1)
    return torch.Generator(device).manual_seed(int(word))


def send_back(outputs, weights, vector):
    """Run a backward pass for its hooks; the weights' gradients are not kept, `.grad` not touched.

    Raises
    ------
    RuntimeError
        If `backward()` has already freed the graph.
    """
    try:
        torch.autograd.grad(outputs, weights, vector, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise RuntimeError(
            "the graph of outputs is gone: call accumulate_fisher before backward()"
        ) from error
