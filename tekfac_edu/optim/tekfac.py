"""TEKFAC in PyTorch: trace-restricted factors, eigenvalues corrected.

    F ≈ (Q_Φ ⊗ Q_Ψ) diag(Θ) (Q_Φ ⊗ Q_Ψ)ᵀ          Θ = E[(Q_Ψᵀ G_n Q_Φ)²]
    damped:  Θ + λ

No δ stands in front of Θ: it is measured from the gradients and already has the scale of F.
Gao, Liu, Huang, Wang, Wang, Wang, Xu & Yu 2020. `reference/tekfac.py` is the same idea in NumPy;
its uncorrected sibling is `tkfac.py`; `ekfac.py` is the same with factors of independence.
"""

from tekfac_edu.optim.eigenvalues import MeasuredEigenvalues
from tekfac_edu.optim.factors import trace_restricted_factors
from tekfac_edu.optim.optimizer import KroneckerOptimizer


class TEKFAC(KroneckerOptimizer):
    """TEKFAC: trace-restricted factors, eigenvalues corrected."""

    factors = staticmethod(trace_restricted_factors)  # δ, Φ, Ψ
    eigenvalues = MeasuredEigenvalues  # Θ

    @staticmethod
    def damped(eigenvalues, damping):
        """Θ + λ: (d_out, d_in)."""
        return eigenvalues.D + damping
