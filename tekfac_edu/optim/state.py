"""An optimizer's state, and whether a state is of this method and this model.

A state holds everything that decides the numbers to come: what torch keeps (momentum, parameter
groups), the steps taken, the settings, and every layer's curvature.
"""

from tekfac_edu.optim.settings import Settings


def state_of(optimizer):
    """What is added to torch's own state: plain data and tensors."""
    return {
        "method": type(optimizer).__name__,
        "steps": optimizer.steps,
        "settings": optimizer.settings.as_dict(),
        "curvatures": {layer.name: c.state_dict() for layer, c in optimizer.curvatures.items()},
    }


def load_state(optimizer, state, load_groups):
    """Take over a state.

    load_groups : torch's own `load_state_dict` of this optimizer.

    Raises
    ------
    ValueError
        If it is of another method or model; nothing has been loaded then.
    """
    refuse_foreign_state(optimizer, state)
    settings = Settings.from_dict(optimizer.stages(), state["settings"])
    load_groups({name: state[name] for name in ("state", "param_groups")})
    for layer, curvature in optimizer.curvatures.items():
        curvature.load_state_dict(state["curvatures"][layer.name])
    optimizer.steps = state["steps"]
    optimizer.take(settings)


def refuse_foreign_state(optimizer, state):
    """ValueError if a state is of another method, or of a model of other layers."""
    method = type(optimizer).__name__
    needed = {"state", "param_groups", "method", "steps", "settings", "curvatures"}
    if missing := needed - set(state):
        raise ValueError(f"this is no state of {method}: it has no {', '.join(sorted(missing))}")
    if state["method"] != method:
        raise ValueError(f"this is a state of {state['method']}, not of {method}")
    sizes = {layer.name: layer.shape for layer in optimizer.layers}
    curvatures = state["curvatures"]
    if set(sizes) != set(curvatures):
        raise ValueError(
            f"the state has curvature for {sorted(curvatures)}; the model has {sorted(sizes)}"
        )
    for name, size in sizes.items():
        basis = curvatures[name]["basis"]
        if basis is not None:  # truncated or not, Q_in has a row per input
            theirs = (*basis["Q_out"].shape[:-1], basis["Q_in"].shape[-2])
            if theirs != size:
                raise ValueError(f"{name} is {size} here and {theirs} in the state")
    ours = [p for group in optimizer.param_groups for p in group["params"]]
    theirs = [index for group in state["param_groups"] for index in group["params"]]
    sizes, their_sizes = (
        [len(group["params"]) for group in groups]
        for groups in (optimizer.param_groups, state["param_groups"])
    )
    if sizes != their_sizes:
        raise ValueError(f"parameter groups of {sizes} tensors here, of {their_sizes} in the state")
    for p, index in zip(ours, theirs, strict=True):
        momentum = state["state"].get(index, {}).get("momentum_buffer")
        if momentum is not None and momentum.shape != p.shape:
            name = optimizer.parameter_names.get(p, "a parameter")
            raise ValueError(f"{name} is {(*p.shape,)} here and {(*momentum.shape,)} in the state")
