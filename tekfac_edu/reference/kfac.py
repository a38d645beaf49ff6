"""KFAC: factors of independence, eigenvalues as the factors give them.

    F = E[Λ ⊗ Γ] ≈ E[Λ] ⊗ E[Γ] = A ⊗ G              D = s_G s_Aᵀ
    damped:  (A + π√λ I) ⊗ (G + (√λ/π) I)

Martens & Grosse 2015. Beside chapter 4; `ekfac.py` measures its eigenvalues instead, `tkfac.py` has
other factors. `optim/kfac.py` is the same in PyTorch.
"""

from dataclasses import dataclass

import numpy as np

from tekfac_edu.reference.damping import kfac_damping
from tekfac_edu.reference.eigenbasis import eigenbasis, precondition
from tekfac_edu.reference.factors import kfac_factors
from tekfac_edu.reference.inputs import enough_damping


@dataclass(frozen=True)
class KFAC:
    """KFAC's approximation of one layer's Fisher block; build it with `fit` or `from_factors`.

    Attributes
    ----------
    A, G : (d_in, d_in) and (d_out, d_out) arrays, the factors, as in KFACFactors.
    s_in, Q_in : (d_in,) and (d_in, d_in) arrays, the eigendecomposition of A.
    s_out, Q_out : (d_out,) and (d_out, d_out) arrays, that of G.
    """

    A: np.ndarray
    G: np.ndarray
    s_in: np.ndarray
    Q_in: np.ndarray
    s_out: np.ndarray
    Q_out: np.ndarray

    factors = staticmethod(kfac_factors)
    bases = ("eigh",)

    @property
    def eigenvalues(self):
        """D = s_G s_Aᵀ, (d_out, d_in), undamped."""
        return np.outer(self.s_out, self.s_in)

    def damped(self, damping):
        """(s_G + √λ/π)(s_A + π√λ)ᵀ: (d_out, d_in), what a gradient in the basis is divided by.

        Raises ValueError if damping is negative, or zero while A or G is singular.
        """
        damping = enough_damping(damping, self.s_in, self.s_out)
        add_in, add_out = kfac_damping(self.s_in.mean(), self.s_out.mean(), damping)
        return np.outer(self.s_out + add_out, self.s_in + add_in)

    @classmethod
    def fit(cls, a, g):
        """From inputs a and gradients g of one layer; shapes as for `kfac_factors`."""
        return cls.from_factors(cls.factors(a, g))

    @classmethod
    def from_factors(cls, factors):
        """From (running averages of) the factors."""
        A, G = factors.A, factors.G
        return cls(A, G, *eigenbasis(A), *eigenbasis(G))

    def turned_to(self, factors, next_basis):
        """The approximation by other factors: eigenvalues come with the basis, which is theirs."""
        return self.from_factors(factors)

    def measured(self, a, g, decay=0.0):
        """The same: nothing is measured."""
        return self

    def dense(self, damping=0.0):
        """(A + π√λ I) ⊗ (G + (√λ/π) I), formed: (d_in·d_out, d_in·d_out)."""
        add_in, add_out = kfac_damping(self.s_in.mean(), self.s_out.mean(), damping)
        I_in, I_out = np.eye(len(self.A)), np.eye(len(self.G))
        return np.kron(self.A + add_in * I_in, self.G + add_out * I_out)

    def trace(self):
        """tr A · tr G, which is tr F only if ‖ā‖² and ‖g‖² are uncorrelated."""
        return float(np.trace(self.A) * np.trace(self.G))

    def precondition(self, M, damping):
        """Solve with `dense(damping)` for a gradient M, (d_out, d_in) -> (d_out, d_in).

        Raises ValueError as `damped`, or if M is of another shape.
        """
        return precondition(M, self.Q_in, self.Q_out, self.damped(damping))
