"""Damping: what each paper adds before it inverts.

    KFAC     (A + π√λ I) ⊗ (G + (√λ/π) I),   π² = (tr A / d_in) / (tr G / d_out)     KFAC §6.3
    TKFAC    (√δ Φ + √λ I) ⊗ (√δ Ψ + √λ I)                                           TKFAC (5.15)
    EKFAC, TEKFAC    D + λ                                                           TEKFAC (3.4)

λ has the units of F. The first two spread it over the factors, because a sum A ⊗ G + λ I is no
Kronecker product; the last two can simply add it, because they hold the eigenvalues one by one.
Beside chapter 5.
"""

import numpy as np

from tekfac_edu.arguments import real_number
from tekfac_edu.reference.inputs import square_matrix


def nonnegative_damping(damping):
    """damping as a float >= 0; ValueError otherwise."""
    return real_number("damping", damping, at_least=0)


def kfac_pi(A, G):
    """π = √( (tr A / d_in) / (tr G / d_out) ): the mean eigenvalue of A over that of G, rooted.

    It makes the split of λ blind to which factor carries the scale (KFAC §6.3). One, if either
    trace is zero, where the rule says nothing.
    """
    A, G = square_matrix("A", A), square_matrix("G", G)
    mean_A, mean_G = np.trace(A) / len(A), np.trace(G) / len(G)
    return float(np.sqrt(mean_A) / np.sqrt(mean_G)) if mean_A > 0 and mean_G > 0 else 1.0


def kfac_damping(A, G, damping):
    """What KFAC adds to the two factors: (π√λ, √λ/π).

    Parameters
    ----------
    A : (d_in, d_in) array.   G : (d_out, d_out) array.   damping : λ >= 0, in units of F.
    """
    root, pi = np.sqrt(nonnegative_damping(damping)), kfac_pi(A, G)
    return float(pi * root), float(root / pi)


def trace_damping(trace, dim, floor=0.0, multiplier=1.0):
    """τ · max(tr, ϑ) / dim: a layer's own λ, the mean of its spectrum (TEKFAC (3.5)).

    Parameters
    ----------
    trace : tr(Θ), or δ for TKFAC; >= 0, in units of F.   dim : d_in · d_out of the layer.
    floor : ϑ >= 0, keeps λ positive when gradients vanish.   multiplier : τ > 0; the paper has 1.
    """
    trace = real_number("trace", trace, at_least=0)
    floor = real_number("floor", floor, at_least=0)
    multiplier = real_number("multiplier", multiplier, above=0)
    return multiplier * max(trace, floor) / real_number("dim", dim, at_least=1)
