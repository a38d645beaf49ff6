"""TKFAC in PyTorch: trace-restricted factors, eigenvalues as the factors give them.

    F ≈ δ Φ ⊗ Ψ      δ = E[tr Λ · tr Γ],  Φ = E[tr(Γ) Λ]/δ,  Ψ = E[tr(Λ) Γ]/δ      D = δ s_Ψ s_Φᵀ
    damped:  (√δ Φ + √λ I) ⊗ (√δ Ψ + √λ I)

Gao, Liu, Huang, Wang, Wang, Xu & Yu 2021. `reference/tkfac.py` is the same idea in NumPy; its
corrected sibling is `tekfac.py`.
"""

from tekfac_edu.optim.factors import trace_restricted_factors
from tekfac_edu.optim.optimizer import KroneckerOptimizer


class TKFAC(KroneckerOptimizer):
    """TKFAC: trace-restricted factors, eigenvalues as the factors give them."""

    estimate_factors = staticmethod(trace_restricted_factors)
    corrected = False
