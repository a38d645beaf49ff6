"""How each module of a model is treated: factored, or plain momentum SGD, and why.

Nothing is skipped in silence: a module that a reader would expect to be factored and is not is an
error that names it, unless it is listed in `plain`; every other parameter appears in
`repr(optimizer)` with its reason.
"""

from torch import nn

from tekfac_edu.optim.layers import factored_layer, kind_of, refusal


def find_layers(model, plain=()):
    """The factored layers of a model, and how everything else is treated.

    Parameters
    ----------
    model : nn.Module, possibly wrapped by DistributedDataParallel or torch.compile.
    plain : names of modules to leave to plain momentum SGD, with all modules inside them.

    Returns
    -------
    layers : list of Layer, in the order of the model.
    treatments : dict, name of module or parameter -> text, of everything in the model.

    Raises
    ------
    ValueError
        If a module cannot be factored and is not in plain; if a name in plain is unknown.
    """
    modules = dict(unwrapped(model).named_modules())
    _refuse_sharded(modules)
    plain = {plain} if isinstance(plain, str) else set(plain)
    if unknown := plain - set(modules):
        raise ValueError(
            f"plain names {sorted(unknown)}, which the model does not have; "
            f"its modules are {sorted(filter(None, modules))}"
        )
    owners = {}
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(name)
    layers, treatments = [], {}
    for name, module in modules.items():
        if not list(module.parameters(recurse=False)):
            continue
        reason = _why_plain(name, module, modules, plain)
        if reason is None:
            layer = _layer(name, module, owners)
            layers.append(layer)
            treatments[name] = "factored"
            if module.bias is not None and not layer.has_bias:
                treatments[f"{name}.bias".lstrip(".")] = "frozen"
        else:
            treatments[name] = reason
    return layers, treatments


def _why_plain(name, module, modules, plain):
    """Why a module with parameters is not factored; None if it is."""
    if any(name == listed or listed == "" or name.startswith(listed + ".") for listed in plain):
        return "plain SGD (asked for)"
    if not any(p.requires_grad for p in module.parameters(recurse=False)):
        return "frozen"
    if (problem := refusal(module)) is not None:
        raise ValueError(
            f"{name or 'the model'} ({type(module).__name__}) cannot be factored: {problem}; "
            f"plain=[{name!r}] trains it with plain momentum SGD"
        )
    if kind_of(module) is None:
        return f"plain SGD (no factorization for {type(module).__name__})"
    if isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention):
        return "plain SGD (MultiheadAttention never calls it)"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "plain SGD (its weight is computed from other parameters)"
    if not module.weight.requires_grad:
        return "plain SGD (its weight is frozen)"
    return None


def _layer(name, module, owners):
    weight, bias = module.weight, module.bias
    if nn.parameter.is_lazy(weight):
        raise ValueError(
            f"{name} has no size yet; run one forward pass before the optimizer is built"
        )
    for parameter in filter(lambda p: p is not None, (weight, bias)):
        if not parameter.is_floating_point():
            raise ValueError(f"{name} has parameters of dtype {parameter.dtype}, not real numbers")
        others = [owner for owner in owners[parameter] if owner != name]
        if others:
            raise ValueError(
                f"{name} cannot be factored: it shares a parameter with {', '.join(others)}; "
                f"plain={[name, *others]!r} trains them with plain momentum SGD"
            )
    return factored_layer(name, module, bias is not None and bias.requires_grad)


def unwrapped(model):
    """The model inside DistributedDataParallel or torch.compile, so that names are its own.

    Raises
    ------
    ValueError
        For nn.DataParallel, whose replicas the hooks cannot see.
    """
    while True:
        if isinstance(model, nn.DataParallel):
            raise ValueError(
                "nn.DataParallel runs copies of the model, which give no statistics: "
                "use DistributedDataParallel"
            )
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod
        else:
            return model


def _refuse_sharded(modules):
    for name, module in modules.items():
        sharded = "FullyShardedDataParallel" in type(module).__name__ or any(
            hasattr(p, "placements") for p in module.parameters(recurse=False)
        )
        if sharded:
            raise ValueError(
                f"{name or 'the model'} is sharded (FSDP); each rank needs whole layers: "
                f"use DistributedDataParallel"
            )
