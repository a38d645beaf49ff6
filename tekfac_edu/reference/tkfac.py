"""TKFAC: trace-restricted factors, eigenvalues as the factors give them.

    F ≈ δ Φ ⊗ Ψ      δ = E[tr Λ · tr Γ],  Φ = E[tr(Γ) Λ]/δ,  Ψ = E[tr(Λ) Γ]/δ      D = δ s_Ψ s_Φᵀ
    damped:  (√δ Φ + √λ I) ⊗ (√δ Ψ + √λ I)

Gao, Liu, Huang, Wang, Wang, Xu & Yu 2021. Beside chapter 7; its corrected sibling is `tekfac.py`.
"""

from dataclasses import dataclass

import numpy as np

from tekfac_edu.reference.damping import nonnegative_damping
from tekfac_edu.reference.eigenbasis import eigenbasis, precondition_factored
from tekfac_edu.reference.factors import TraceRestrictedFactors, trace_restricted_factors


@dataclass(frozen=True)
class TKFAC:
    """TKFAC's approximation of one layer's Fisher block; build it with `fit` or `from_factors`.

    Attributes
    ----------
    factors : TraceRestrictedFactors.
    s_in, Q_in : (d_in,) and (d_in, d_in) arrays, the eigendecomposition of Φ.
    s_out, Q_out : (d_out,) and (d_out, d_out) arrays, that of Ψ.
    """

    factors: TraceRestrictedFactors
    s_in: np.ndarray
    Q_in: np.ndarray
    s_out: np.ndarray
    Q_out: np.ndarray

    estimate_factors = staticmethod(trace_restricted_factors)
    corrected = False

    @classmethod
    def fit(cls, a, g):
        """From inputs a and gradients g of one layer; shapes as for `kfac_factors`."""
        return cls.from_factors(trace_restricted_factors(a, g))

    @classmethod
    def from_factors(cls, factors):
        """From (running averages of) the factors."""
        return cls(factors, *eigenbasis(factors.Phi), *eigenbasis(factors.Psi))

    @property
    def eigenvalues(self):
        """D = δ s_Ψ s_Φᵀ, (d_out, d_in), undamped."""
        return self.factors.delta * np.outer(self.s_out, self.s_in)

    def dense(self, damping=0.0):
        """(√δ Φ + √λ I) ⊗ (√δ Ψ + √λ I), formed: (d_in·d_out, d_in·d_out)."""
        root = np.sqrt(nonnegative_damping(damping))
        scale = np.sqrt(self.factors.delta)
        Phi, Psi = self.factors.pair
        return np.kron(scale * Phi + root * np.eye(len(Phi)), scale * Psi + root * np.eye(len(Psi)))

    def trace(self):
        """δ, since tr Φ = tr Ψ = 1: tr F (with positions, of its position-diagonal part)."""
        return float(self.factors.delta)

    def precondition(self, M, damping):
        """Solve with `dense(damping)` for a gradient M, (d_out, d_in) -> (d_out, d_in).

        Raises ValueError if damping is negative, or zero while δ, Φ or Ψ is singular.
        """
        root = np.sqrt(nonnegative_damping(damping))
        scale = np.sqrt(self.factors.delta)
        return precondition_factored(
            M, self.Q_in, self.Q_out, scale * self.s_in, scale * self.s_out, root, root
        )
