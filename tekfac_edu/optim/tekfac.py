"""TEKFAC in PyTorch: trace-restricted factors, eigenvalues measured.

    F ≈ (Q_Φ ⊗ Q_Ψ) diag(Θ) (Q_Φ ⊗ Q_Ψ)ᵀ          Θ = E[(Q_Ψᵀ G_n Q_Φ)²]
    damped:  Θ + λ

No δ stands in front of Θ: it is measured from the gradients and already has the scale of F.
Gao, Liu, Huang, Wang, Wang, Wang, Xu & Yu 2020. `tkfac.py` takes the factors' eigenvalues instead,
`ekfac.py` has other factors. `reference/tekfac.py` is the same in NumPy.
"""

from tekfac_edu.optim.eigenvalues import MeasuredEigenvalues
from tekfac_edu.optim.factors import (
    Formula,
    factors_of_gradients,
    summed_factors,
    trace_restricted_factors,
)
from tekfac_edu.optim.optimizer import KroneckerOptimizer


class TEKFAC(KroneckerOptimizer):
    """TEKFAC: trace-restricted factors, eigenvalues measured."""

    factors = staticmethod(trace_restricted_factors)  # δ, Φ, Ψ
    summed_factors = Formula(summed_factors, factors_of_gradients)  # of G_n, positions summed
    eigenvalues = MeasuredEigenvalues  # Θ

    @staticmethod
    def damped(eigenvalues, damping):
        """Θ + λ: (d_out, d_in)."""
        return eigenvalues.D + damping
