"""TEKFAC: trace-restricted factors, eigenvalues measured.

    F ≈ (Q_Φ ⊗ Q_Ψ) diag(Θ) (Q_Φ ⊗ Q_Ψ)ᵀ          Θ = E[(Q_Ψᵀ G_n Q_Φ)²]
    damped:  Θ + λ

No δ stands in front of Θ: it is measured from the gradients and already has the scale of F.
Gao, Liu, Huang, Wang, Wang, Wang, Xu & Yu 2020. Beside chapter 8; `tkfac.py` takes the factors'
eigenvalues instead, `ekfac.py` has other factors. `optim/tekfac.py` is the same in PyTorch.
"""

from dataclasses import dataclass

import numpy as np

from tekfac_edu.reference.eigenbasis import eigenbasis, precondition
from tekfac_edu.reference.eigenvalues import _moved, _second_moments
from tekfac_edu.reference.factors import _factors_of, summed_factors, trace_restricted_factors
from tekfac_edu.reference.inputs import eigen_form, enough_damping, layer_inputs
from tekfac_edu.reference.kronecker import dense_from_eigenbasis


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

    factors = staticmethod(trace_restricted_factors)
    summed_factors = staticmethod(summed_factors)
    bases = ("eigh", "qr")

    def __post_init__(self):
        eigen_form(self.Q_in, self.Q_out, self.eigenvalues)

    def damped(self, damping):
        """Θ + λ: (d_out, d_in), what a gradient in the basis is divided by.

        Raises ValueError if damping is negative, or zero while an eigenvalue is zero.
        """
        return self.eigenvalues + enough_damping(damping, self.eigenvalues)

    @classmethod
    def fit(cls, a, g, positions="apart"):
        """From inputs a and gradients g of one layer; shapes as for `trace_restricted_factors`.

        positions : "apart", as in the paper, or "summed" (`summed_factors`).
        """
        return cls.from_factors(_factors_of(cls, positions)(a, g)).measured(a, g)

    @classmethod
    def from_factors(cls, factors):
        """The factors' basis; the factors' own eigenvalues stand in until some are `measured`."""
        (s_in, Q_in), (s_out, Q_out) = eigenbasis(factors.S_in), eigenbasis(factors.S_out)
        return cls(Q_in, Q_out, factors.scale * np.outer(s_out, s_in))

    def turned_to(self, factors, next_basis):
        """The approximation in the basis of other factors: eigenvalues move along.

        next_basis : function (S, Q) -> Q, what the basis Q becomes for a factor S.
        """
        Q_in = next_basis(factors.S_in, self.Q_in)
        Q_out = next_basis(factors.S_out, self.Q_out)
        moved = _moved(self.eigenvalues, self.Q_in, self.Q_out, Q_in, Q_out)
        return type(self)(Q_in, Q_out, moved)

    def measured(self, a, g, decay=0.0):
        """With Θ of these examples averaged in; decay is the weight of the old one."""
        a, g = layer_inputs(a, g)
        new = _second_moments(a, g, self.Q_in, self.Q_out)
        return type(self)(self.Q_in, self.Q_out, decay * self.eigenvalues + (1 - decay) * new)

    def dense(self, damping=0.0):
        """(Q_Φ ⊗ Q_Ψ) diag(Θ + λ) (Q_Φ ⊗ Q_Ψ)ᵀ, formed: (d_in·d_out, d_in·d_out)."""
        damped = self.eigenvalues + enough_damping(damping)
        return dense_from_eigenbasis(self.Q_in, self.Q_out, damped)

    def trace(self):
        """The sum of Θ: exactly tr F, since the basis is orthogonal."""
        return float(self.eigenvalues.sum())

    def precondition(self, M, damping):
        """Solve with `dense(damping)` for a gradient M, (d_out, d_in) -> (d_out, d_in).

        Raises ValueError as `damped`, or if M is of another shape.
        """
        return precondition(M, self.Q_in, self.Q_out, self.damped(damping))
