"""TEKFAC: trace-restricted factors, eigenvalues corrected.

    F ≈ (Q_Φ ⊗ Q_Ψ) diag(Θ) (Q_Φ ⊗ Q_Ψ)ᵀ          Θ = E[(Q_Ψᵀ G_n Q_Φ)²]
    damped:  Θ + λ

No δ stands in front of Θ: it is measured from the gradients and already has the scale of F.
Gao, Liu, Huang, Wang, Wang, Wang, Xu & Yu 2020. Beside chapter 8. Its uncorrected sibling is
`tkfac.py`; `ekfac.py` is the same with factors of independence.
"""

from dataclasses import dataclass

import numpy as np

from tekfac_edu.reference.damping import nonnegative_damping
from tekfac_edu.reference.eigenbasis import (
    dense_from_eigenbasis,
    eigenbasis,
    precondition_corrected,
)
from tekfac_edu.reference.factors import trace_restricted_factors
from tekfac_edu.reference.inputs import eigen_form
from tekfac_edu.reference.rescaling import corrected_eigenvalues


@dataclass(frozen=True)
class TEKFAC:
    """TEKFAC's approximation of one layer's Fisher block; build it with `fit`.

    Attributes
    ----------
    Q_in : (d_in, d_in) array, the eigenvectors of Φ.   Q_out : (d_out, d_out) array, those of Ψ.
    eigenvalues : (d_out, d_in) array, Θ = E[(Q_Ψᵀ G_n Q_Φ)²], undamped.
    """

    Q_in: np.ndarray
    Q_out: np.ndarray
    eigenvalues: np.ndarray

    estimate_factors = staticmethod(trace_restricted_factors)
    corrected = True

    def __post_init__(self):
        eigen_form(self.Q_in, self.Q_out, self.eigenvalues)

    @classmethod
    def fit(cls, a, g):
        """From inputs a and gradients g of one layer; shapes as for `trace_restricted_factors`."""
        Phi, Psi = trace_restricted_factors(a, g).pair
        (_, Q_in), (_, Q_out) = eigenbasis(Phi), eigenbasis(Psi)
        return cls(Q_in, Q_out, corrected_eigenvalues(a, g, Q_in, Q_out))

    def dense(self, damping=0.0):
        """(Q_Φ ⊗ Q_Ψ) diag(Θ + λ) (Q_Φ ⊗ Q_Ψ)ᵀ, formed: (d_in·d_out, d_in·d_out)."""
        damped = self.eigenvalues + nonnegative_damping(damping)
        return dense_from_eigenbasis(self.Q_in, self.Q_out, damped)

    def trace(self):
        """The sum of Θ: exactly tr F, since the basis is orthogonal."""
        return float(self.eigenvalues.sum())

    def precondition(self, M, damping):
        """Solve with `dense(damping)` for a gradient M, (d_out, d_in) -> (d_out, d_in).

        Raises ValueError if damping is negative, or zero while an eigenvalue is zero.
        """
        return precondition_corrected(M, self.Q_in, self.Q_out, self.eigenvalues, damping)
