"""Two ways to say a layer's Fisher block with one small matrix per side.

    factors of independence       F ≈ A ⊗ G      A = E[Λ],  G = E[Γ]                    (KFAC)
    trace-restricted factors      F ≈ δ Φ ⊗ Ψ    δ = E[tr Λ · tr Γ],
                                                 Φ = E[tr(Γ) Λ] / δ,  Ψ = E[tr(Λ) Γ] / δ  (TKFAC)

with Λ = ā āᵀ and Γ = g gᵀ of one example. The first pretends that inputs and gradients are
independent. The second weights each example's Λ by how large its gradient was, and the other way
round; it keeps the trace of F whatever the dependence.
Beside chapters 4 and 7. With positions, the rows of all positions count ("expand": KFC;
TKFAC Assumption 4.1); or each example's gradient, summed over its positions (`summed_factors`).
"""

from dataclasses import dataclass

import numpy as np

from tekfac_edu.arguments import one_of, real_number
from tekfac_edu.reference.inputs import layer_inputs


@dataclass(frozen=True)
class KFACFactors:
    """Factors of independence (KFAC §3; KFC for positions).

    Attributes
    ----------
    A : (d_in, d_in) array, E[Σ_t ā āᵀ].  Squared units of the inputs.
    G : (d_out, d_out) array, E[(1/T) Σ_t g gᵀ].  Squared units of the gradients.
    """

    A: np.ndarray
    G: np.ndarray

    scale = 1.0

    @property
    def S_in(self):
        """A: F ≈ scale · S_in ⊗ S_out, for both kinds of factors."""
        return self.A

    @property
    def S_out(self):
        """G."""
        return self.G

    def _averaged(self, new, rho):
        return KFACFactors(rho * self.A + (1 - rho) * new.A, rho * self.G + (1 - rho) * new.G)


@dataclass(frozen=True)
class TraceRestrictedFactors:
    """Trace-restricted factors (TKFAC Theorem 4.1; TEKFAC §3).

    Attributes
    ----------
    delta : float, E[Σ_t ‖ā‖² ‖g‖²], the trace of the (position-diagonal) Fisher block.
    Phi : (d_in, d_in) array of trace one, unitless.
    Psi : (d_out, d_out) array of trace one, unitless.
    """

    delta: float
    Phi: np.ndarray
    Psi: np.ndarray

    @property
    def scale(self):
        """δ: F ≈ scale · S_in ⊗ S_out, for both kinds of factors."""
        return self.delta

    @property
    def S_in(self):
        """Φ."""
        return self.Phi

    @property
    def S_out(self):
        """Ψ."""
        return self.Psi

    def _averaged(self, new, rho):
        old_weight, new_weight = rho * self.delta, (1 - rho) * new.delta
        delta = old_weight + new_weight
        if delta == 0:
            return new
        return TraceRestrictedFactors(
            delta,
            (old_weight * self.Phi + new_weight * new.Phi) / delta,
            (old_weight * self.Psi + new_weight * new.Psi) / delta,
        )


def kfac_factors(a, g):
    """The factors of independence of one layer.

    Parameters
    ----------
    a : (N, d_in) or (N, T, d_in) array, bias-augmented inputs.
    g : same leading axes, or one more in front for S vectors per example; then d_out.
        Gradients of each example's own loss (N times what the mean loss hands back).

    Returns
    -------
    KFACFactors
    """
    a, g = layer_inputs(a, g)
    N, T, _ = a.shape
    A = np.einsum("nti,ntj->ij", a, a) / N
    G = np.einsum("snto,sntp->op", g, g) / (N * T)
    return KFACFactors(A, G)


def trace_restricted_factors(a, g):
    """The trace-restricted factors of one layer (TKFAC Theorem 4.1).

    Parameters
    ----------
    a, g : as for `kfac_factors`. The weights ‖ā_n‖² and ‖g_n‖² are each example's own: with traces
        of batch means in their place the product collapses to KFAC's.

    Returns
    -------
    TraceRestrictedFactors. If every gradient is zero, delta = 0 and the factors, which nothing
    determines, are I/d: the zero matrix, with isotropic factors of trace one.
    """
    a, g = layer_inputs(a, g)
    N, _, d_in = a.shape
    trace_Lambda = np.einsum("nti,nti->nt", a, a)
    trace_Gamma = np.einsum("snto,snto->nt", g, g)
    delta = np.sum(trace_Lambda * trace_Gamma) / N
    if delta == 0:
        return _nothing_known(d_in, g.shape[-1])
    Phi = np.einsum("nt,nti,ntj->ij", trace_Gamma, a, a, optimize=True) / (N * delta)
    Psi = np.einsum("nt,snto,sntp->op", trace_Lambda, g, g, optimize=True) / (N * delta)
    return TraceRestrictedFactors(float(delta), Phi, Psi)


def summed_factors(a, g):
    """The trace-restricted factors of each example's summed gradient, G_n = Σ_t g_nt ā_ntᵀ (ours).

        δ = E‖G_n‖²,   δΦ = E[G_nᵀ G_n],   δΨ = E[G_n G_nᵀ]

    The same as `trace_restricted_factors` where nothing is shared (T = 1). With positions these are
    the true trace and partial traces of F; the paper's are those of its position-diagonal part.

    Parameters
    ----------
    a, g : as for `kfac_factors`.

    Returns
    -------
    TraceRestrictedFactors, as from `trace_restricted_factors` if every G_n is zero.
    """
    a, g = layer_inputs(a, g)
    G = np.einsum("snto,nti->snoi", g, a, optimize=True)
    delta = np.sum(G**2) / len(a)
    if delta == 0:
        return _nothing_known(a.shape[-1], g.shape[-1])
    Phi = np.einsum("snoi,snoj->ij", G, G, optimize=True) / (len(a) * delta)
    Psi = np.einsum("snoi,snpi->op", G, G, optimize=True) / (len(a) * delta)
    return TraceRestrictedFactors(float(delta), Phi, Psi)


def _factors_of(method, positions):
    """A method's function of a and g for its factors.

    positions : "apart", as in the papers, or "summed", of a method that has `summed_factors`.
    """
    ways = {"apart": method.factors}
    if hasattr(method, "summed_factors"):
        ways["summed"] = method.summed_factors
    return ways[one_of("positions", positions, ways)]


def _nothing_known(d_in, d_out):
    """Factors of the zero matrix: delta = 0, and isotropic ones of trace one."""
    return TraceRestrictedFactors(0.0, np.eye(d_in) / d_in, np.eye(d_out) / d_out)


def averaged(old, new, decay):
    """The running average `decay · old + (1 − decay) · new` of factors.

    Trace-restricted factors are averaged as their numerators δΦ, δΨ and δ. Under one common decay
    δΦ and δΨ stay the partial traces of the averaged Fisher block, and δ its trace. Averaging the
    ratios Φ and Ψ themselves would give a batch of tiny gradients the same say as any other;
    unequal decays would break even the trace.

    Parameters
    ----------
    old, new : KFACFactors or TraceRestrictedFactors, both of one kind and size.
    decay : weight of the old, 0 to 1.
    """
    sizes = [old.S_in.shape, old.S_out.shape]
    if type(new) is not type(old) or [new.S_in.shape, new.S_out.shape] != sizes:
        shapes = [new.S_in.shape, new.S_out.shape] if hasattr(new, "S_in") else ""
        raise ValueError(
            f"new must be {type(old).__name__} of sizes {sizes}; got {type(new).__name__} {shapes}"
        )
    return old._averaged(new, real_number("decay", decay, at_least=0, at_most=1))
