"""Parameter groups: those given, and one of all parameters that are in none."""

import torch

from tekfac_edu.arguments import real_number

SETTINGS = {  # and the bounds of each
    "lr": {"at_least": 0},
    "momentum": {"at_least": 0, "below": 1},
    "weight_decay": {"at_least": 0},
    "damping": {"above": 0},
}


def check_settings(group):
    """ValueError that names the setting of a group that is out of its bounds."""
    for name, bounds in SETTINGS.items():
        real_number(name, group[name], **bounds)
    if "lr_other" in group:
        raise TypeError("lr_other is gone: a group's lr is that of all its parameters")


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
    for group in (*given, rest):
        check_settings(group)
    return [group for group in (*given, rest) if group["params"]]


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


def _as_list(parameters):
    return [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
