"""A layer's basis, and all that is computed in it; a truncated one is in `truncation.py`."""

from typing import NamedTuple

import torch

from tekfac_edu.optim import eigenvalues
from tekfac_edu.optim.eigenbasis import precondition


class Eigenvectors(NamedTuple):
    """Of both factors of a layer.

    Attributes
    ----------
    Q_in : (d_in, d_in) tensor, orthogonal.   Q_out : (d_out, d_out) tensor, orthogonal.
    """

    Q_in: torch.Tensor
    Q_out: torch.Tensor


class Basis(Eigenvectors):
    """`Eigenvectors`, and what is computed in them: the formulas of `eigenvalues.py`."""

    __slots__ = ()

    corrected_eigenvalues = staticmethod(eigenvalues.corrected_eigenvalues)
    second_moments = staticmethod(eigenvalues.second_moments)
    precondition = staticmethod(precondition)

    @property
    def shape(self):
        """Of D."""
        return (*self.Q_out.shape[:-1], self.Q_in.shape[-1])

    def whole(self, D):
        """(d_out, d_in) tensor: D, one number per direction."""
        return D
