"""Parameter groups: those given, one of all parameters that are in none; and the update by them.

m ← τ m + direction,   θ ← θ − α β θ − α m
"""

import torch
from torch.profiler import record_function

from tekfac_edu.arguments import real_number

SETTINGS = {  # and the bounds of each
    "lr": {"at_least": 0},
    "momentum": {"at_least": 0, "below": 1},
    "weight_decay": {"at_least": 0},
    "damping": {"above": 0},
}


def checked(group):
    """The group, its settings as floats; ValueError that names one that is out of its bounds."""
    if "lr_other" in group:
        raise TypeError("lr_other is gone: a group's lr is that of all its parameters")
    return group | {name: real_number(name, group[name], **SETTINGS[name]) for name in SETTINGS}


def complete_groups(given, parameters, defaults):
    """The groups for torch: those given, then what is left.

    Parameters
    ----------
    given : list of dicts, "params" and any of `SETTINGS`.
    parameters : all of the model's.   defaults : dict of `SETTINGS`, where a group gives none.

    Raises
    ------
    ValueError
        If a setting is out of its bounds, or a parameter is not of the model.
    """
    given = [{**defaults, **group, "params": _as_list(group["params"])} for group in given]
    taken = {p for group in given for p in group["params"]}
    if strangers := taken - set(parameters):
        shapes = [(*p.shape,) for p in strangers]
        raise ValueError(f"param_groups has parameters the model has not, of shapes {shapes}")
    rest = {**defaults, "params": [p for p in parameters if p not in taken]}
    return [group for group in map(checked, (*given, rest)) if group["params"]]


def damping_of_layers(layers, groups):
    """λ of the group of each layer's parameters: a dict.

    Raises
    ------
    ValueError
        If a layer's weight and bias are in groups of different damping.
    """
    group_of = {p: group for group in groups for p in group["params"]}
    found = {}
    for layer in layers:
        found[layer] = group_of[layer.weight]["damping"]
        if layer.has_bias and group_of[layer.bias]["damping"] != found[layer]:
            raise ValueError(
                f"{layer} has its weight in a parameter group of damping {found[layer]} and its "
                f"bias in one of {group_of[layer.bias]['damping']}; they are damped together: give "
                f"both groups the same damping"
            )
    return found


@record_function("tekfac_edu: update")
def descend(optimizer, directions):
    """Move every parameter that has a gradient: by its layer's direction, or else by SGD.

    directions : {Layer: (d_out, d_in) tensor}.
    """
    of_parameter = {}
    for layer, direction in directions.items():
        of_parameter |= layer.parts(direction)
    for group in optimizer.param_groups:
        moving = [p for p in group["params"] if p.grad is not None]
        if not moving:
            continue
        steps = [of_parameter.get(p, p.grad).to(p.dtype) for p in moving]
        if group["momentum"] > 0:
            for p in moving:
                if "momentum_buffer" not in optimizer.state[p]:
                    optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [optimizer.state[p]["momentum_buffer"] for p in moving]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, steps)
            steps = buffers
        if group["weight_decay"] > 0:
            torch._foreach_mul_(moving, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(moving, steps, alpha=-group["lr"])


def _as_list(parameters):
    return [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
