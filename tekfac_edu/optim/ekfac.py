"""EKFAC in PyTorch: factors of independence, eigenvalues measured.

    F ≈ (Q_A ⊗ Q_G) diag(S*) (Q_A ⊗ Q_G)ᵀ          S* = E[(Q_Gᵀ G_n Q_A)²]
    damped:  S* + λ

George, Laurent, Bouthillier, Ballas & Vincent 2018. `kfac.py` takes the factors' eigenvalues
instead, `tekfac.py` has other factors. `reference/ekfac.py` is the same in NumPy.
"""

from tekfac_edu.optim.eigenvalues import MeasuredEigenvalues
from tekfac_edu.optim.factors import kfac_factors
from tekfac_edu.optim.optimizer import KroneckerOptimizer


class EKFAC(KroneckerOptimizer):
    """EKFAC: factors of independence, eigenvalues measured."""

    factors = staticmethod(kfac_factors)  # A, G
    eigenvalues = MeasuredEigenvalues  # S*

    @staticmethod
    def damped(eigenvalues, damping):
        """S* + λ: (d_out, d_in)."""
        return eigenvalues.D + damping
