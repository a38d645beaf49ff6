"""Damping: what each paper adds before it inverts, and how large λ is in each layer.

    KFAC     (A + π√λ I) ⊗ (G + (√λ/π) I),   π² = (tr A / d_in) / (tr G / d_out)     KFAC §6.3
    TKFAC    (√δ Φ + √λ I) ⊗ (√δ Ψ + √λ I)                                           TKFAC (5.15)
    EKFAC, TEKFAC    D + λ                                                           TEKFAC (3.4)

λ has the units of F. The first two spread it over the factors, because a sum A ⊗ G + λ I is no
Kronecker product; the last two can simply add it, because they hold the eigenvalues one by one.
Each method's `damped` says its line of this table. A rule says which λ a layer gets, and whether
the method's line is used:

    Paper(λ)      λ in every layer, each method's own line; a bare number means this
    Added(λ)      λ in every layer, D + λ for all four methods
    ByTrace(λ)    a λ for each layer, of its spectrum's size; each method's own line  TEKFAC (3.5)

Beside chapter 5.
"""

from dataclasses import dataclass

import numpy as np

from tekfac_edu.arguments import real_number
from tekfac_edu.reference.inputs import enough_damping


def kfac_pi(mean_in, mean_out):
    """π = √( (tr A / d_in) / (tr G / d_out) ): the mean eigenvalue of A over that of G, rooted.

    It makes the split of λ blind to which factor carries the scale (KFAC §6.3). One, if either
    mean is zero, where the rule says nothing.

    Parameters
    ----------
    mean_in : tr A / d_in >= 0, a float.   mean_out : tr G / d_out >= 0, a float.
    """
    mean_in = real_number("mean_in", mean_in, at_least=0)
    mean_out = real_number("mean_out", mean_out, at_least=0)
    return float(np.sqrt(mean_in) / np.sqrt(mean_out)) if mean_in > 0 and mean_out > 0 else 1.0


def kfac_damping(mean_in, mean_out, damping):
    """What KFAC adds to the eigenvalues of its two factors: (π√λ, √λ/π).

    Parameters
    ----------
    mean_in, mean_out : as for `kfac_pi`.   damping : λ >= 0, in units of F.
    """
    root, pi = np.sqrt(enough_damping(damping)), kfac_pi(mean_in, mean_out)
    return float(pi * root), float(root / pi)


@dataclass(frozen=True)
class Paper:
    """Each method's own published way, with one λ for all layers; a bare number means this.

    Attributes
    ----------
    damping : λ >= 0, in units of F.
    """

    damping: float

    def __post_init__(self):
        real_number("damping", self.damping, at_least=0)

    def layer_dampings(self, layers):
        """λ of each layer: a list of floats. layers : list of LayerCurvature."""
        return [self.damping] * len(layers)

    def damped(self, approximation, damping):
        """(d_out, d_in) array: what one layer's gradient is divided by in the basis, λ = damping.

        approximation : a KFAC, EKFAC, TKFAC or TEKFAC.
        """
        return approximation.damped(damping)


@dataclass(frozen=True)
class Added:
    """D + λ for all four methods, with one λ for all layers (Tikhonov; for KFAC and TKFAC ours).

    Attributes
    ----------
    damping : λ >= 0, in units of F.
    """

    damping: float

    def __post_init__(self):
        real_number("damping", self.damping, at_least=0)

    def layer_dampings(self, layers):
        """λ of each layer, as in `Paper`."""
        return [self.damping] * len(layers)

    def damped(self, approximation, damping):
        """D + λ, (d_out, d_in); arguments as for `Paper.damped`."""
        return approximation.eigenvalues + enough_damping(damping, approximation.eigenvalues)


@dataclass(frozen=True)
class ByTrace:
    """To each convolution a λ of its spectrum's size, to dense layers one by the largest.

        λ_l = τ · max(tr D_l, ϑ) / dim    of a convolution, dim = d_in · d_out
        λ · max_l λ_l                     of a dense layer; λ itself if there is no convolution

    TEKFAC (3.5). What dense layers get is our reading of a secondary source. Inside a layer each
    method damps in its own way.

    Attributes
    ----------
    damping : λ >= 0; unitless beside convolutions, else in units of F.
    multiplier : τ > 0, unitless; the paper has 1.
    floor : ϑ >= 0, in units of F; it keeps λ_l positive when gradients vanish.
    """

    damping: float
    multiplier: float = 1.0
    floor: float = 1e-8

    def __post_init__(self):
        real_number("damping", self.damping, at_least=0)
        real_number("multiplier", self.multiplier, above=0)
        real_number("floor", self.floor, at_least=0)

    def layer_dampings(self, layers):
        """λ of each layer: a list of floats. layers : list of LayerCurvature."""
        by_trace = [self._by_trace(layer.approximation) for layer in layers]
        of_convolutions = [
            damping for damping, layer in zip(by_trace, layers, strict=True) if layer.is_convolution
        ]
        dense = self.damping * max(of_convolutions, default=1.0)
        return [
            damping if layer.is_convolution else dense
            for damping, layer in zip(by_trace, layers, strict=True)
        ]

    def _by_trace(self, approximation):
        trace, dim = approximation.trace(), approximation.eigenvalues.size
        return self.multiplier * max(trace, self.floor) / dim

    def damped(self, approximation, damping):
        """As `Paper.damped`."""
        return approximation.damped(damping)
