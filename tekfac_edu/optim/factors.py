"""A layer's Fisher block with one small matrix per side; `reference/factors.py` in torch.

    factors of independence       F ≈ A ⊗ G      A = E[Λ],  G = E[Γ]                    (KFAC)
    trace-restricted factors      F ≈ δ Φ ⊗ Ψ    δ = E[tr Λ · tr Γ],
                                                 Φ = E[tr(Γ) Λ] / δ,  Ψ = E[tr(Λ) Γ] / δ  (TKFAC)

Every field of a result is a mean over examples, never a ratio of means. So the mean over chunks of
a batch, over the parts of an accumulated one, over processes and over time is taken field by field,
and the identities of the factors survive all four.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

SPLIT = 512  # columns from which two halves of a product are faster than one whole


class KFACFactors(NamedTuple):
    """Factors of independence (KFAC §3; KFC for positions): F ≈ A ⊗ G.

    Attributes
    ----------
    A : (d_in, d_in) tensor, E[Σ_t ā āᵀ].  Squared units of the inputs.
    G : (d_out, d_out) tensor, E[(1/T) Σ_t g gᵀ].  Squared units of the gradients.
    """

    A: torch.Tensor
    G: torch.Tensor

    @property
    def S_in(self):
        """(d_in, d_in) tensor, whose eigenvectors are the basis on the side of the inputs: A."""
        return self.A

    @property
    def S_out(self):
        """(d_out, d_out) tensor, the same on the side of the outputs: G."""
        return self.G

    @property
    def scale(self):
        """() tensor, 1: F ≈ scale · S_in ⊗ S_out."""
        return torch.ones_like(self.A[..., 0, 0])


class TraceRestrictedFactors(NamedTuple):
    """Trace-restricted factors (TKFAC Theorem 4.1; TEKFAC §3): F ≈ δ Φ ⊗ Ψ; held as numerators.

    Attributes
    ----------
    delta : () tensor, E[Σ_t ‖ā‖² ‖g‖²], the trace of the (position-diagonal) Fisher block.
    delta_Phi : (d_in, d_in) tensor, E[Σ_t ‖g‖² ā āᵀ].
    delta_Psi : (d_out, d_out) tensor, E[Σ_t ‖ā‖² g gᵀ].
    """

    delta: torch.Tensor
    delta_Phi: torch.Tensor
    delta_Psi: torch.Tensor

    @property
    def Phi(self):
        """(d_in, d_in) tensor of trace one; I/d_in if delta is zero."""
        return _trace_one(self.delta_Phi, self.delta)

    @property
    def Psi(self):
        """(d_out, d_out) tensor of trace one; I/d_out if delta is zero."""
        return _trace_one(self.delta_Psi, self.delta)

    @property
    def S_in(self):
        """(d_in, d_in) tensor, whose eigenvectors are the basis on the side of the inputs: Φ."""
        return self.Phi

    @property
    def S_out(self):
        """(d_out, d_out) tensor, the same on the side of the outputs: Ψ."""
        return self.Psi

    @property
    def scale(self):
        """() tensor, δ: F ≈ scale · S_in ⊗ S_out."""
        return self.delta


def _trace_one(numerator, delta):
    known = (delta > 0)[..., None, None]
    S = numerator / torch.where(known, delta[..., None, None], 1.0)
    S.diagonal(dim1=-2, dim2=-1).add_(known[..., 0].logical_not().to(S.dtype) / S.shape[-1])
    return S


class Formula(NamedTuple):
    """One statistic in two ways, for whichever is cheaper; further arguments are the same for both.

    of_rows : formula of a: (N, T, d_in) and g: (S, N, T, d_out).
    of_gradients : formula of G: (S, N, d_out, d_in), the examples' gradients, formed.
    """

    of_rows: Callable
    of_gradients: Callable


def averaged(old, new, decay):
    """Running average decay · old + (1 − decay) · new, numerator by numerator; decay: of the old.

    Under one common decay δΦ and δΨ stay the partial traces of the averaged Fisher block, and δ its
    trace. Averaging the ratios Φ and Ψ would give a batch of tiny gradients the say of any other.
    """
    return type(old)(*(y.lerp(x, decay) for x, y in zip(old, new, strict=True)))


def layer_format(a, g):
    """a: (N, T, d_in) and g: (S, N, T, d_out) of one layer, from any of the shapes of `reference`.

    Raises
    ------
    ValueError
        If their axes do not match.
    """
    if a.ndim not in (2, 3) or g.ndim not in (a.ndim, a.ndim + 1):
        raise ValueError(
            f"a must be (N, d_in) or (N, T, d_in), and g have the same leading axes or one more in "
            f"front, for several vectors per example; their shapes are "
            f"{(*a.shape,)} and {(*g.shape,)}"
        )
    g = g if g.ndim == a.ndim + 1 else g[None]
    if g.shape[1:-1] != a.shape[:-1]:
        raise ValueError(
            f"a and g must agree in every axis before the last (examples, positions); "
            f"a has {(*a.shape[:-1],)}, g has {(*g.shape[1:-1],)}"
        )
    return (a, g) if a.ndim == 3 else (a[:, None], g[:, :, None])


def kfac_factors(a, g):
    """The factors of independence of one layer.

    Parameters
    ----------
    a : (N, d_in) or (N, T, d_in) tensor, bias-augmented inputs.
    g : same leading axes, or one more in front for S vectors per example; then d_out.
        Gradients of each example's own loss (N times what the mean loss hands back).

    Returns
    -------
    KFACFactors
    """
    a, g = layer_format(a, g)
    N, T, _ = a.shape
    a, g = a.flatten(0, 1), g.flatten(0, 2)
    return KFACFactors(_gram(a) / N, _gram(g) / (N * T))


def trace_restricted_factors(a, g):
    """The trace-restricted factors of one layer (TKFAC Theorem 4.1).

    Parameters
    ----------
    a, g : as for `kfac_factors`. The weights ‖ā_n‖² and ‖g_n‖² are each example's own (and each
        position's): with traces of batch means in their place the product collapses to KFAC's.

    Returns
    -------
    TraceRestrictedFactors
    """
    a, g = layer_format(a, g)
    N = len(a)
    trace_Lambda, trace_Gamma = a.square().sum(-1), g.square().sum(-1)
    trace_Gamma_all = trace_Gamma.sum(0)
    delta = (trace_Lambda * trace_Gamma_all).sum() / N
    root_a = (a * (trace_Gamma_all[..., None] / N).sqrt()).flatten(0, 1)
    root_g = (g * (trace_Lambda[..., None] / N).sqrt()).flatten(0, 2)
    return TraceRestrictedFactors(delta, _gram(root_a), _gram(root_g))


def summed_factors(a, g):
    """The trace-restricted factors of each example's summed gradient, G_n = Σ_t g_nt ā_ntᵀ (ours).

        δ = E‖G_n‖²,   δΦ = E[G_nᵀ G_n],   δΨ = E[G_n G_nᵀ]

    They are the true trace and partial traces of F, where those of `trace_restricted_factors` are
    of its position-diagonal part; the same with T = 1. Nothing of size d_out × d_in is formed.

    Parameters
    ----------
    a, g : as for `kfac_factors`.

    Returns
    -------
    TraceRestrictedFactors
    """
    a, g = layer_format(a, g)
    N = len(a)
    pairs_a, pairs_g = a @ a.mT, g @ g.mT  # (N, T, T) and (S, N, T, T)
    delta = (pairs_a * pairs_g).sum() / N
    delta_Phi = (pairs_g.sum(0) @ a).flatten(0, 1).T @ a.flatten(0, 1) / N
    delta_Psi = (pairs_a @ g).flatten(0, 2).T @ g.flatten(0, 2) / N
    return TraceRestrictedFactors(delta, delta_Phi, delta_Psi)


def factors_of_gradients(G):
    """`summed_factors` of gradients that have been formed.

    G : (S, N, d_out, d_in) tensor, one for every vector and example.
    """
    N = G.shape[1]
    delta_Phi = _gram(G.flatten(0, 2)) / N
    delta_Psi = (G @ G.mT).sum((0, 1)) / N
    return TraceRestrictedFactors(delta_Psi.diagonal().sum(), delta_Phi, delta_Psi)


def _gram(rows):
    """rowsᵀ rows: (R, d) -> (d, d). A large one computes what lies above the diagonal only once."""
    d = rows.shape[1]
    if d < SPLIT or len(rows) < 2 * d:
        return rows.T @ rows
    x, y = rows.tensor_split([d // 2], 1)
    above = x.T @ y
    return torch.cat([torch.cat([_gram(x), above], 1), torch.cat([above.T, _gram(y)], 1)])
