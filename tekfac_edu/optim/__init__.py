"""KFAC, EKFAC, TKFAC and TEKFAC as PyTorch optimizers, and the functions they are made of.

    optimizer = TEKFAC(model, lr=...)
    ...
    optimizer.zero_grad(); loss = criterion(model(x), y); loss.backward(); optimizer.step()

The four are a 2 × 2 table, as in `tekfac_edu.reference`, whose functions have the same names:

                                eigenvalues as the factors give them    eigenvalues corrected
    factors of independence     KFAC                                    EKFAC
    trace-restricted factors    TKFAC                                   TEKFAC
"""

from tekfac_edu.optim.damping import Added, ByTrace, Paper, kfac_damping, kfac_pi
from tekfac_edu.optim.eigenbasis import eigenbasis, qr_iteration
from tekfac_edu.optim.eigenvalues import corrected_eigenvalues, move_eigenvalues
from tekfac_edu.optim.ekfac import EKFAC
from tekfac_edu.optim.factors import (
    KFACFactors,
    TraceRestrictedFactors,
    averaged,
    kfac_factors,
    summed_factors,
    trace_restricted_factors,
)
from tekfac_edu.optim.kfac import KFAC
from tekfac_edu.optim.settings import Cost
from tekfac_edu.optim.tekfac import TEKFAC
from tekfac_edu.optim.tkfac import TKFAC

__all__ = [
    "EKFAC",
    "KFAC",
    "TEKFAC",
    "TKFAC",
    "Added",
    "ByTrace",
    "Cost",
    "KFACFactors",
    "Paper",
    "TraceRestrictedFactors",
    "averaged",
    "corrected_eigenvalues",
    "eigenbasis",
    "kfac_damping",
    "kfac_factors",
    "kfac_pi",
    "move_eigenvalues",
    "qr_iteration",
    "summed_factors",
    "trace_restricted_factors",
]
