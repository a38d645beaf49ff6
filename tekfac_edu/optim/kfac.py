"""KFAC in PyTorch: factors of independence, eigenvalues as the factors give them.

    F = E[Λ ⊗ Γ] ≈ E[Λ] ⊗ E[Γ] = A ⊗ G              D = s_G s_Aᵀ
    damped:  (A + π√λ I) ⊗ (G + (√λ/π) I)

Martens & Grosse 2015; for convolutions Grosse & Martens 2016. `ekfac.py` measures its eigenvalues
instead, `tkfac.py` has other factors. `reference/kfac.py` is the same in NumPy.
"""

from tekfac_edu.optim.damping import kfac_damping
from tekfac_edu.optim.eigenvalues import FactorEigenvalues
from tekfac_edu.optim.factors import kfac_factors
from tekfac_edu.optim.optimizer import KroneckerOptimizer


class KFAC(KroneckerOptimizer):
    """KFAC: factors of independence, eigenvalues as the factors give them."""

    factors = staticmethod(kfac_factors)  # A, G
    eigenvalues = FactorEigenvalues  # s_G s_Aᵀ

    @staticmethod
    def damped(eigenvalues, damping):
        """(s_G + √λ/π)(s_A + π√λ)ᵀ: (d_out, d_in)."""
        add_in, add_out = kfac_damping(eigenvalues.mean_in, eigenvalues.mean_out, damping)
        return eigenvalues.plus(add_in, add_out)
