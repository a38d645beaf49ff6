"""TKFAC in PyTorch: trace-restricted factors, eigenvalues as the factors give them.

    F ≈ δ Φ ⊗ Ψ      δ = E[tr Λ · tr Γ],  Φ = E[tr(Γ) Λ]/δ,  Ψ = E[tr(Λ) Γ]/δ      D = δ s_Ψ s_Φᵀ
    damped:  (√δ Φ + √λ I) ⊗ (√δ Ψ + √λ I)

Gao, Liu, Huang, Wang, Wang, Xu & Yu 2021. `tekfac.py` measures its eigenvalues instead, `kfac.py`
has other factors. `reference/tkfac.py` is the same in NumPy.
"""

from tekfac_edu.optim.eigenvalues import FactorEigenvalues
from tekfac_edu.optim.factors import (
    Formula,
    factors_of_gradients,
    summed_factors,
    trace_restricted_factors,
)
from tekfac_edu.optim.optimizer import KroneckerOptimizer


class TKFAC(KroneckerOptimizer):
    """TKFAC: trace-restricted factors, eigenvalues as the factors give them."""

    factors = staticmethod(trace_restricted_factors)  # δ, Φ, Ψ
    summed_factors = Formula(summed_factors, factors_of_gradients)  # of G_n, positions summed
    eigenvalues = FactorEigenvalues  # δ s_Ψ s_Φᵀ

    @staticmethod
    def damped(eigenvalues, damping):
        """(√δ s_Ψ + √λ)(√δ s_Φ + √λ)ᵀ: (d_out, d_in)."""
        root = damping**0.5
        return eigenvalues.plus(root, root)
