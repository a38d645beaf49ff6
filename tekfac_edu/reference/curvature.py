"""What one layer remembers between steps: factors, their basis, and eigenvalues in that basis.

    factors        S ← ρ S + (1 − ρ) S_batch          (trace-restricted ones as their numerators)
    basis          Q ← the eigenvectors of S
    eigenvalues    KFAC, TKFAC: come with the basis
                   EKFAC, TEKFAC: move along when it turns, and  D ← ρ D + (1 − ρ) D_batch

The three may be refreshed at different steps. What becomes of eigenvalues is for the method to say,
in its `turned_to` and its `measured`. Beside chapter 5.
"""

import numpy as np

from tekfac_edu.arguments import one_of, real_number
from tekfac_edu.reference.eigenbasis import eigenbasis, qr_iteration
from tekfac_edu.reference.factors import _factors_of

# name: (factor S, present basis Q) -> next basis
BASES = {"eigh": lambda S, Q: eigenbasis(S)[1], "qr": qr_iteration}


class LayerCurvature:
    """One layer's averaged factors, and the method's approximation built from them.

    Parameters
    ----------
    method : KFAC, EKFAC, TKFAC or TEKFAC.
    decay : ρ, weight of the old value in the running averages, 0 to 1.
    positions : "apart", as in the papers, or "summed" (TKFAC, TEKFAC): how factors count them.
    basis : "eigh", or "qr" for one warm-started QR iteration per turn (EKFAC, TEKFAC).

    Attributes
    ----------
    factors : running average, or None before the first batch.
    approximation : the method's object, or None before the first basis.
    is_convolution : whether the layer is used at several positions of an example.
    """

    def __init__(self, method, decay=0.95, basis="eigh", positions="apart"):
        self.method = method
        self.batch_factors = _factors_of(method, positions)
        self.decay = real_number("decay", decay, at_least=0, at_most=1)
        self.basis = one_of("basis", basis, BASES)
        if basis not in method.bases:
            raise ValueError(
                f'basis="qr" is for EKFAC and TEKFAC, which are exact about any basis; '
                f'{method.__name__} needs the eigenvalues of its factors: "eigh"'
            )
        self.factors = self.approximation = self.is_convolution = None
        self.weight_of_old_eigenvalues = 0.0

    def average_factors(self, a, g):
        """Average in the factors of a batch; the first batch replaces."""
        new = self.batch_factors(a, g)
        self.factors = new if self.factors is None else self.factors._averaged(new, self.decay)
        self.is_convolution = np.ndim(a) == 3

    def turn_to(self, factors):
        """Take over the eigenbasis of these factors; measured eigenvalues move along."""
        if self.approximation is None:
            self.approximation = self.method.from_factors(factors)
        else:
            self.approximation = self.approximation.turned_to(factors, BASES[self.basis])

    def average_eigenvalues(self, a, g):
        """Average in the eigenvalues of a batch, in the present basis; the first batch replaces."""
        self.approximation = self.approximation.measured(a, g, self.weight_of_old_eigenvalues)
        self.weight_of_old_eigenvalues = self.decay
