"""The optimizers of a race, one row each: names, labels and options follow from this table."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tekfac_edu.optim import EKFAC, KFAC, TEKFAC, TKFAC


class DecoupledSGD(torch.optim.SGD):
    """torch's SGD with momentum, with the weight decay of AdamW: θ ← θ − lr · weight_decay · θ."""

    def __init__(self, parameters, lr, momentum, weight_decay):
        super().__init__(parameters, lr, momentum)
        self.decay = weight_decay

    @torch.no_grad()
    def step(self, closure=None):
        if self.decay:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.mul_(1 - group["lr"] * self.decay)
        return super().step(closure)


def adam(parameters, lr, momentum, weight_decay):
    """AdamW; the momentum is its β1."""
    return torch.optim.AdamW(parameters, lr, (momentum, 0.999), weight_decay=weight_decay)


@dataclass(frozen=True)
class Method:
    """An optimizer.

    Attributes
    ----------
    label : its name in tables and figures.
    make : called with (parameters, lr, momentum, weight_decay), or, of Kronecker factors, with the
        model and everything that a configuration says.
    eigenbases : the values of `Cost.eigenbasis` it can take; none: it has no Kronecker factors.
    """

    label: str
    make: Callable
    eigenbases: tuple[str, ...] = ()


METHODS = {
    "sgd": Method("SGD", DecoupledSGD),
    "adam": Method("Adam", adam),
    "kfac": Method("KFAC", KFAC, ("eigh",)),
    "ekfac": Method("EKFAC", EKFAC, ("eigh", "qr")),
    "tkfac": Method("TKFAC", TKFAC, ("eigh",)),
    "tekfac": Method("TEKFAC", TEKFAC, ("eigh", "qr")),
}
OPTIMIZERS = tuple(METHODS)
KRONECKER = tuple(name for name, method in METHODS.items() if method.eigenbases)
