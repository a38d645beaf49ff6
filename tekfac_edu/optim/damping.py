"""Damping: what each paper adds before it inverts, and by which λ; `reference/damping.py` in torch.

    KFAC            (A + π√λ I) ⊗ (G + (√λ/π) I),  π² = (tr A / d_in) / (tr G / d_out)    KFAC §6.3
    TKFAC           (√δ Φ + √λ I) ⊗ (√δ Ψ + √λ I)                                      TKFAC (5.15)
    EKFAC, TEKFAC   D + λ                                                              TEKFAC (3.4)
    per layer       λ_l = τ max(tr D_l, ϑ) / dim                                       TEKFAC (3.5)

The first three are said by the methods' own pages (`damped`). A rule says which λ each layer has,
and whether it is damped in its method's way.
"""

from dataclasses import dataclass, fields

import torch

from tekfac_edu.arguments import real_number


def kfac_pi(mean_in, mean_out):
    """π = √( (tr A / d_in) / (tr G / d_out) ), a () tensor; 1 if either is zero (KFAC §6.3).

    It makes the split of λ blind to which factor carries the scale.

    mean_in, mean_out : () tensors, the mean eigenvalues of the two factors.
    """
    pi = (mean_in.sqrt() / mean_out.sqrt()).nan_to_num(nan=1.0, posinf=1.0)
    return torch.where(pi > 0, pi, torch.ones_like(pi))


def kfac_damping(mean_in, mean_out, damping):
    """What KFAC adds to the two factors: (π√λ, √λ/π), () tensors.

    mean_in, mean_out : as for `kfac_pi`.   damping : λ > 0, in units of F.
    """
    root, pi = damping**0.5, kfac_pi(mean_in, mean_out)
    return pi * root, root / pi


@dataclass(frozen=True)
class Paper:
    """Each method's own way, with one λ; a bare number means this.

    Attributes
    ----------
    damping : λ > 0, in units of the Fisher; a parameter group may have another.
    """

    damping: float

    def __post_init__(self):
        for field in fields(self):
            number = real_number(field.name, getattr(self, field.name), above=0)
            object.__setattr__(self, field.name, number)  # a state has no NumPy numbers

    def layer_dampings(self, dampings, curvatures):
        """λ of each layer.

        dampings : {Layer: λ of its group}.   curvatures : {Layer: LayerCurvature}.
        """
        return dampings

    def damped(self, method, eigenvalues, damping):
        """The damped eigenvalues of a layer, (d_out, d_in): by the method's `damped`."""
        return method.damped(eigenvalues, damping)


@dataclass(frozen=True)
class Added(Paper):
    """D + λ for all four methods."""

    def damped(self, method, eigenvalues, damping):
        """D + λ."""
        return eigenvalues.D + damping


@dataclass(frozen=True)
class ByTrace(Paper):
    """TEKFAC (3.5): a convolution has its own λ_l = τ max(tr D_l, ϑ) / dim, dense layers λ max λ_l.

    If there is no convolution, λ itself. Within a layer, each method's own way.

    Attributes
    ----------
    damping : λ > 0, unitless: of the dense layers, relative to the largest λ_l.
    multiplier : τ > 0; the paper has 1.
    floor : ϑ > 0, in units of the Fisher; keeps λ_l positive when gradients vanish.
    """

    multiplier: float = 1.0
    floor: float = 1e-8

    def layer_dampings(self, dampings, curvatures):
        """λ of each layer; () tensors once there is a convolution with eigenvalues."""
        by_trace = {
            layer: self.multiplier * curvature.trace.clamp(min=self.floor) / curvature.dim
            for layer, curvature in curvatures.items()
            if layer.is_convolution and curvature.ready
        }
        if not by_trace:
            return dampings
        largest = torch.stack(list(by_trace.values())).max()
        return {
            layer: by_trace.get(layer, largest * damping) for layer, damping in dampings.items()
        }


RULES = {rule.__name__: rule for rule in (Paper, Added, ByTrace)}


def rule_from(damping):
    """The rule that `damping=` means: itself, or `Paper` of a number; ValueError for neither."""
    return damping if isinstance(damping, Paper) else Paper(damping)
