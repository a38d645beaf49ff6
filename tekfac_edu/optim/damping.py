"""Damping: what each paper adds before it inverts; `reference/damping.py` in torch, on eigenvalues.

KFAC     (A + π√λ I) ⊗ (G + (√λ/π) I),   π² = mean eigenvalue of A / that of G   KFAC §6.3
TKFAC    (√δ Φ + √λ I) ⊗ (√δ Ψ + √λ I)                                           TKFAC (5.15)
EKFAC, TEKFAC    D + λ                                                           TEKFAC (3.4)
any of them with its own λ_l = τ max(tr D_l, ϑ) / dim per layer                  TEKFAC (3.5)
"""

import torch


def kfac_pi(A, G):
    """π = √( (tr A / d_in) / (tr G / d_out) ), a () tensor; 1 if either trace is zero (KFAC §6.3).

    It makes the split of λ blind to which factor carries the scale.
    """
    return root_of_ratio(A.diagonal().mean(), G.diagonal().mean())


def root_of_ratio(mean_in, mean_out):
    """π from the mean eigenvalues of the two factors."""
    pi = (mean_in.sqrt() / mean_out.sqrt()).nan_to_num(nan=1.0, posinf=1.0)
    return torch.where(pi > 0, pi, torch.ones_like(pi))


def split_damping(s_in, s_out, pi, damping):
    """(s_out + √λ/π)(s_in + π√λ)ᵀ, eigenvalues of the damped product: (d_out, d_in)."""
    root = damping**0.5
    return torch.outer(s_out + root / pi, s_in + pi * root)


def trace_damping(trace, dim, floor=0.0, multiplier=1.0):
    """τ · max(tr, ϑ) / dim: a layer's own λ, the mean of its spectrum (TEKFAC (3.5)); a () tensor.

    Parameters
    ----------
    trace : () tensor >= 0, tr D of the layer, in units of F.   dim : d_in · d_out.
    floor : ϑ >= 0, keeps λ positive when gradients vanish.   multiplier : τ; the paper has 1.
    """
    return multiplier * trace.clamp(min=floor) / dim
