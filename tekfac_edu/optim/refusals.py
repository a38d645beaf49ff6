"""What a step or a state is refused for, before anything has changed."""

import torch

from tekfac_edu.optim.layers import gradient_matrix
from tekfac_edu.optim.warning import warn


def gradient_of(layer):
    """M: (d_out, d_in), from `.grad` of weight and bias; None if neither has one.

    Raises
    ------
    RuntimeError
        If only one of the two has one.
    """
    missing = [p.grad is None for p in (layer.weight, layer.bias) if p is not None]
    if any(missing) and not all(missing):
        raise RuntimeError(
            f"{layer} has a gradient for only one of its weight and bias, which are factored "
            f"together; after freezing or unfreezing parameters, build a new optimizer"
        )
    if all(missing):
        return None
    return gradient_matrix(layer.weight.grad, layer.bias.grad if layer.has_bias else None)


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

    gradients : dict Layer -> M.   batches : dict module -> LayerBatch.
    """
    capture = optimizer.capture
    if optimizer.fisher != "empirical" and capture.wanted and not capture.fisher_asked:
        raise RuntimeError(
            f'fisher="{optimizer.fisher}" needs optimizer.accumulate_fisher(outputs) between the '
            f"forward and the backward pass, after zero_grad; this step takes statistics, and it "
            f"was not called"
        )
    for layer in gradients:
        if not optimizer.curvatures[layer].ready and layer.module not in batches:
            raise RuntimeError(
                f"{layer} has a gradient, but no call in training mode was seen, so there are no "
                f"statistics to precondition it with; call model.train(), or leave it to plain "
                f"momentum SGD with plain_sgd=[{layer.name!r}]. A model that torch.compile had "
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


def refuse_foreign_state(optimizer, state_dict):
    """ValueError if a state is of another method, or of a model of other layers."""
    method = type(optimizer).__name__
    needed = {"state", "param_groups", "method", "steps", "curvatures", "generator"}
    if missing := needed - set(state_dict):
        raise ValueError(f"this is no state of {method}: it has no {', '.join(sorted(missing))}")
    if state_dict["method"] != method:
        raise ValueError(f"this is a state of {state_dict['method']}, not of {method}")
    sizes = {layer.name: (layer.d_out, layer.d_in) for layer in optimizer.layers}
    curvatures = state_dict["curvatures"]
    if set(sizes) != set(curvatures):
        raise ValueError(
            f"the state has curvature for {sorted(curvatures)}; the model has {sorted(sizes)}"
        )
    for name, size in sizes.items():
        bases = [curvatures[name][side] for side in ("Q_out", "Q_in")]
        theirs = tuple(len(Q) for Q in bases if Q is not None)  # whatever their input_rank
        if theirs and theirs != size:
            raise ValueError(f"{name} is {size} here and {theirs} in the state")
    ours = [p for group in optimizer.param_groups for p in group["params"]]
    theirs = [index for group in state_dict["param_groups"] for index in group["params"]]
    sizes, their_sizes = (
        [len(group["params"]) for group in groups]
        for groups in (optimizer.param_groups, state_dict["param_groups"])
    )
    if sizes != their_sizes:
        raise ValueError(f"parameter groups of {sizes} tensors here, of {their_sizes} in the state")
    for p, index in zip(ours, theirs, strict=True):
        momentum = state_dict["state"].get(index, {}).get("momentum_buffer")
        if momentum is not None and momentum.shape != p.shape:
            name = optimizer.parameter_names.get(p, "a parameter")
            raise ValueError(f"{name} is {(*p.shape,)} here and {(*momentum.shape,)} in the state")
