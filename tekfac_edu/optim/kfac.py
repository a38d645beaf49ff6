"""KFAC in PyTorch: factors of independence, eigenvalues as the factors give them.

    F = E[Λ ⊗ Γ] ≈ E[Λ] ⊗ E[Γ] = A ⊗ G              D = s_G s_Aᵀ
    damped:  (A + π√λ I) ⊗ (G + (√λ/π) I)

Martens & Grosse 2015; for convolutions Grosse & Martens 2016. `reference/kfac.py` is the same idea
in NumPy; its corrected sibling is `ekfac.py`.
"""

from tekfac_edu.optim.factors import kfac_factors
from tekfac_edu.optim.optimizer import KroneckerOptimizer


class KFAC(KroneckerOptimizer):
    """KFAC: factors of independence, eigenvalues as the factors give them."""

    estimate_factors = staticmethod(kfac_factors)
    corrected = False
