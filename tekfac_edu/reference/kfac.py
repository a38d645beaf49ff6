"""KFAC: factors of independence, eigenvalues as the factors give them.

    F = E[Λ ⊗ Γ] ≈ E[Λ] ⊗ E[Γ] = A ⊗ G              D = s_G s_Aᵀ
    damped:  (A + π√λ I) ⊗ (G + (√λ/π) I)

Martens & Grosse 2015. Beside chapter 4; its corrected sibling is `ekfac.py`.
"""

from dataclasses import dataclass

import numpy as np

from tekfac_edu.reference.damping import kfac_damping
from tekfac_edu.reference.eigenbasis import eigenbasis, precondition_factored
from tekfac_edu.reference.factors import KFACFactors, kfac_factors


@dataclass(frozen=True)
class KFAC:
    """KFAC's approximation of one layer's Fisher block; build it with `fit` or `from_factors`.

    Attributes
    ----------
    factors : KFACFactors.
    s_in, Q_in : (d_in,) and (d_in, d_in) arrays, the eigendecomposition of A.
    s_out, Q_out : (d_out,) and (d_out, d_out) arrays, that of G.
    """

    factors: KFACFactors
    s_in: np.ndarray
    Q_in: np.ndarray
    s_out: np.ndarray
    Q_out: np.ndarray

    estimate_factors = staticmethod(kfac_factors)
    corrected = False

    @classmethod
    def fit(cls, a, g):
        """From inputs a and gradients g of one layer; shapes as for `kfac_factors`."""
        return cls.from_factors(kfac_factors(a, g))

    @classmethod
    def from_factors(cls, factors):
        """From (running averages of) the factors."""
        return cls(factors, *eigenbasis(factors.A), *eigenbasis(factors.G))

    @property
    def eigenvalues(self):
        """D = s_G s_Aᵀ, (d_out, d_in), undamped."""
        return np.outer(self.s_out, self.s_in)

    def dense(self, damping=0.0):
        """(A + π√λ I) ⊗ (G + (√λ/π) I), formed: (d_in·d_out, d_in·d_out)."""
        A, G = self.factors.pair
        add_in, add_out = kfac_damping(A, G, damping)
        return np.kron(A + add_in * np.eye(len(A)), G + add_out * np.eye(len(G)))

    def trace(self):
        """tr A · tr G, which is tr F only if ‖ā‖² and ‖g‖² are uncorrelated."""
        return float(np.trace(self.factors.A) * np.trace(self.factors.G))

    def precondition(self, M, damping):
        """Solve with `dense(damping)` for a gradient M, (d_out, d_in) -> (d_out, d_in).

        Raises ValueError if damping is negative, or zero while A or G is singular.
        """
        add_in, add_out = kfac_damping(*self.factors.pair, damping)
        return precondition_factored(
            M, self.Q_in, self.Q_out, self.s_in, self.s_out, add_in, add_out
        )
