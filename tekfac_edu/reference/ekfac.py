"""EKFAC: factors of independence, eigenvalues corrected.

    F ≈ (Q_A ⊗ Q_G) diag(S*) (Q_A ⊗ Q_G)ᵀ          S* = E[(Q_Gᵀ G_n Q_A)²]
    damped:  S* + λ

George, Laurent, Bouthillier, Ballas & Vincent 2018. Beside chapter 6. Its uncorrected sibling is
`kfac.py`; `tekfac.py` is the same with trace-restricted factors.
"""

from dataclasses import dataclass

import numpy as np

from tekfac_edu.reference.damping import nonnegative_damping
from tekfac_edu.reference.eigenbasis import (
    dense_from_eigenbasis,
    eigenbasis,
    precondition_corrected,
)
from tekfac_edu.reference.factors import kfac_factors
from tekfac_edu.reference.inputs import eigen_form
from tekfac_edu.reference.rescaling import corrected_eigenvalues


@dataclass(frozen=True)
class EKFAC:
    """EKFAC's approximation of one layer's Fisher block; build it with `fit`.

    Attributes
    ----------
    Q_in : (d_in, d_in) array, the eigenvectors of A.   Q_out : (d_out, d_out) array, those of G.
    eigenvalues : (d_out, d_in) array, S* = E[(Q_Gᵀ G_n Q_A)²], undamped.
    """

    Q_in: np.ndarray
    Q_out: np.ndarray
    eigenvalues: np.ndarray

    estimate_factors = staticmethod(kfac_factors)
    corrected = True

    def __post_init__(self):
        eigen_form(self.Q_in, self.Q_out, self.eigenvalues)

    @classmethod
    def fit(cls, a, g):
        """From inputs a and gradients g of one layer; shapes as for `kfac_factors`."""
        A, G = kfac_factors(a, g).pair
        (_, Q_in), (_, Q_out) = eigenbasis(A), eigenbasis(G)
        return cls(Q_in, Q_out, corrected_eigenvalues(a, g, Q_in, Q_out))

    def dense(self, damping=0.0):
        """(Q_A ⊗ Q_G) diag(S* + λ) (Q_A ⊗ Q_G)ᵀ, formed: (d_in·d_out, d_in·d_out)."""
        damped = self.eigenvalues + nonnegative_damping(damping)
        return dense_from_eigenbasis(self.Q_in, self.Q_out, damped)

    def trace(self):
        """The sum of S*: exactly tr F, since the basis is orthogonal."""
        return float(self.eigenvalues.sum())

    def precondition(self, M, damping):
        """Solve with `dense(damping)` for a gradient M, (d_out, d_in) -> (d_out, d_in).

        Raises ValueError if damping is negative, or zero while an eigenvalue is zero.
        """
        return precondition_corrected(M, self.Q_in, self.Q_out, self.eigenvalues, damping)
