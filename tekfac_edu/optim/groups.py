"""Parameter groups: each of the user's becomes two, its factored parameters and its others.

The two have learning rates of different meaning: for a factored layer lr multiplies a
preconditioned direction, for the others a gradient, as in SGD.
"""

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


def split_groups(given, parameters, factored, defaults, lr_other, natural):
    """The groups for torch: those given, then what is left, each as factored and others.

    Parameters
    ----------
    given : list of dicts, "params" and any of `SETTINGS` and lr_other.
    parameters : all of the model's.   factored : set of those that are in a factored layer.
    defaults : dict of `SETTINGS`, where a group gives none.
    lr_other : of others, where a group gives neither it nor lr; None: as `natural` says.
    natural : whether the others' learning rate is lr / damping, or else lr.

    Raises
    ------
    ValueError
        If a setting is out of its bounds, or a parameter is not of the model.
    """
    given = [{**group, "params": _as_list(group["params"])} for group in given]
    taken = {p for group in given for p in group["params"]}
    if strangers := taken - set(parameters):
        shapes = [(*p.shape,) for p in strangers]
        raise ValueError(f"param_groups has parameters the model has not, of shapes {shapes}")
    rest = [p for p in parameters if p not in taken]
    groups = []
    for group in [*given, {"params": rest, "lr_other": lr_other}]:
        settings = {**defaults, **group}
        other = settings.pop("lr_other", None if "lr" in group else lr_other)
        check_settings(settings)
        if other is None:
            other = settings["lr"] / settings["damping"] if natural else settings["lr"]
        other = real_number("lr_other", other, **SETTINGS["lr"])
        mine = [p for p in group["params"] if p in factored]
        others = [p for p in group["params"] if p not in factored]
        groups += [{**settings, "params": mine}, {**settings, "params": others, "lr": other}]
    return [group for group in groups if group["params"]]


def _as_list(parameters):
    return [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
