"""What a model, a step or a call is refused for, before anything has changed."""

import torch

from tekfac_edu.optim.warning import warn


def refuse_model(optimizer, model):
    """TypeError for the class that the methods share; ValueError unless model is an nn.Module."""
    if optimizer.factors is None:
        raise TypeError("KroneckerOptimizer is what KFAC, EKFAC, TKFAC and TEKFAC share: use those")
    if not isinstance(model, torch.nn.Module):
        raise ValueError(
            f"model must be the nn.Module itself, not its parameters: its layers' inputs are "
            f"needed; got {type(model).__name__}"
        )


def refuse_module(optimizer, module, M):
    """The layer of a module that is factored and has curvature, and that M fits.

    Raises
    ------
    ValueError, RuntimeError
        If it is not factored, or M has another shape; before the first step.
    """
    layer = next((layer for layer in optimizer.layers if layer.module is module), None)
    if layer is None:
        raise ValueError(
            f"{type(module).__name__} is not a factored module of this optimizer; those are "
            f"{', '.join(map(str, optimizer.layers))}"
        )
    if (*M.shape,) != layer.shape:
        raise ValueError(f"M must have shape {layer.shape} for {layer}; it has {(*M.shape,)}")
    if not optimizer.curvatures[layer].ready:
        raise RuntimeError(f"{layer} has no curvature yet: take a step first")
    return layer


def gradients_are_finite(optimizer):
    """Whether all gradients are; warns if not, with the parameters' names."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = {p: p.grad for p in parameters if p.grad is not None}

    def name(p):
        return optimizer.parameter_names.get(p, f"a parameter of shape {(*p.shape,)}")

    if sparse := [name(p) for p, gradient in gradients.items() if gradient.is_sparse]:
        raise RuntimeError(f"the gradient of {', '.join(sparse)} is sparse; use sparse=False")
    if not gradients or torch.nn.utils.get_total_norm(gradients.values()).isfinite():
        return True
    bad = [name(p) for p, gradient in gradients.items() if not gradient.isfinite().all()]
    if bad:
        warn(f"step skipped, nothing changed: gradients are not finite in {', '.join(bad)}")
    return not bad


def refuse_missing_statistics(optimizer, gradients, batches):
    """RuntimeError if a layer would have to be preconditioned, and nothing was captured for it.

    gradients : dict Layer -> M.   batches : dict Layer -> LayerBatch.
    """
    capture = optimizer.capture
    if optimizer.settings.fisher != "empirical" and capture.wanted and not capture.fisher_asked:
        raise RuntimeError(
            f'fisher="{optimizer.settings.fisher}" needs optimizer.accumulate_fisher(outputs) '
            f"between the forward and the backward pass, after zero_grad; this step takes "
            f"statistics, and it was not called"
        )
    for layer in gradients:
        if not optimizer.curvatures[layer].ready and layer not in batches:
            raise RuntimeError(
                f"{layer} has a gradient, but no call in training mode was seen, so there are no "
                f"statistics to precondition it with; call model.train(), or leave it to plain "
                f"momentum SGD with plain=[{layer.name!r}]. A model that torch.compile had "
                f"already run needs torch._dynamo.reset() once the optimizer is built, and a "
                f"checkpointed one use_reentrant=False under this fisher"
            )


def refuse_grad_scaler(optimizer):
    """RuntimeError if GradScaler.step called; it leaves two attributes on the optimizer."""
    if hasattr(optimizer, "found_inf"):
        del optimizer.found_inf, optimizer.grad_scale
        raise RuntimeError(
            f"torch.amp.GradScaler is not supported: {type(optimizer).__name__} would take its "
            f"statistics from scaled gradients. Use autocast with bfloat16, which needs no scaler"
        )
