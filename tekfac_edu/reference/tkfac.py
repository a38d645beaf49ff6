"""TKFAC: trace-restricted factors, eigenvalues as the factors give them.

    F ≈ δ Φ ⊗ Ψ      δ = E[tr Λ · tr Γ],  Φ = E[tr(Γ) Λ]/δ,  Ψ = E[tr(Λ) Γ]/δ      D = δ s_Ψ s_Φᵀ
    damped:  (√δ Φ + √λ I) ⊗ (√δ Ψ + √λ I)

Gao, Liu, Huang, Wang, Wang, Xu & Yu 2021. Beside chapter 7; `tekfac.py` measures its eigenvalues
instead, `kfac.py` has other factors. `optim/tkfac.py` is the same in PyTorch.
"""

from dataclasses import dataclass

import numpy as np

from tekfac_edu.reference.eigenbasis import eigenbasis, precondition
from tekfac_edu.reference.factors import _factors_of, summed_factors, trace_restricted_factors
from tekfac_edu.reference.inputs import enough_damping


@dataclass(frozen=True)
class TKFAC:
    """TKFAC's approximation of one layer's Fisher block; build it with `fit` or `from_factors`.

    Attributes
    ----------
    delta, Phi, Psi : float, (d_in, d_in) and (d_out, d_out) arrays, as in TraceRestrictedFactors.
    s_in, Q_in : (d_in,) and (d_in, d_in) arrays, the eigendecomposition of Φ.
    s_out, Q_out : (d_out,) and (d_out, d_out) arrays, that of Ψ.
    """

    delta: float
    Phi: np.ndarray
    Psi: np.ndarray
    s_in: np.ndarray
    Q_in: np.ndarray
    s_out: np.ndarray
    Q_out: np.ndarray

    factors = staticmethod(trace_restricted_factors)
    summed_factors = staticmethod(summed_factors)
    bases = ("eigh",)

    @property
    def eigenvalues(self):
        """D = δ s_Ψ s_Φᵀ, (d_out, d_in), undamped."""
        return self.delta * np.outer(self.s_out, self.s_in)

    def damped(self, damping):
        """(√δ s_Ψ + √λ)(√δ s_Φ + √λ)ᵀ: (d_out, d_in), what a gradient in the basis is divided by.

        Raises ValueError if damping is negative, or zero while δ, Φ or Ψ is singular.
        """
        s_in, s_out = np.sqrt(self.delta) * self.s_in, np.sqrt(self.delta) * self.s_out
        root = np.sqrt(enough_damping(damping, s_in, s_out))
        return np.outer(s_out + root, s_in + root)

    @classmethod
    def fit(cls, a, g, positions="apart"):
        """From inputs a and gradients g of one layer; shapes as for `kfac_factors`.

        positions : "apart", as in the paper, or "summed" (`summed_factors`).
        """
        return cls.from_factors(_factors_of(cls, positions)(a, g))

    @classmethod
    def from_factors(cls, factors):
        """From (running averages of) the factors."""
        delta, Phi, Psi = factors.delta, factors.Phi, factors.Psi
        return cls(delta, Phi, Psi, *eigenbasis(Phi), *eigenbasis(Psi))

    def turned_to(self, factors, next_basis):
        """The approximation by other factors: eigenvalues come with the basis, which is theirs."""
        return self.from_factors(factors)

    def measured(self, a, g, decay=0.0):
        """The same: nothing is measured."""
        return self

    def dense(self, damping=0.0):
        """(√δ Φ + √λ I) ⊗ (√δ Ψ + √λ I), formed: (d_in·d_out, d_in·d_out)."""
        root, scale = np.sqrt(enough_damping(damping)), np.sqrt(self.delta)
        I_in, I_out = np.eye(len(self.Phi)), np.eye(len(self.Psi))
        return np.kron(scale * self.Phi + root * I_in, scale * self.Psi + root * I_out)

    def trace(self):
        """δ, since tr Φ = tr Ψ = 1: tr F (with positions, of its position-diagonal part)."""
        return float(self.delta)

    def precondition(self, M, damping):
        """Solve with `dense(damping)` for a gradient M, (d_out, d_in) -> (d_out, d_in).

        Raises ValueError as `damped`, or if M is of another shape.
        """
        return precondition(M, self.Q_in, self.Q_out, self.damped(damping))
