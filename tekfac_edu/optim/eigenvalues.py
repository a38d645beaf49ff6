"""The eigenvalues D: of the factors, or measured; and carrying them into another basis.

    of the factors    D = s_out s_inᵀ                    scale · S_in ⊗ S_out     (KFAC, TKFAC)
    corrected         D = E[(Q_outᵀ G_n Q_in)²]          element-wise square      (EKFAC, TEKFAC)

`reference/eigenvalues.py` in torch. EKFAC calls the second S*, TEKFAC calls it Θ. With T positions,
G_n = Σ_t g_nt ā_ntᵀ, there are two orders of computing it:

    project, then form      N·(T·d_in² + S·T·d_out² + S·T·d_in·d_out)    multiplications
    form, then project      N·S·(T·d_in·d_out + d_in·d_out² + d_out·d_in²)

The second is far cheaper when T is large, and for a convolution needs no patches. With T = 1
nothing needs to be formed: G_n has rank one and D = ((g Q_out)²)ᵀ ((a Q_in)²) / N, one product.
"""

from typing import NamedTuple

import torch

from tekfac_edu.optim.factors import layer_format


class FactorEigenvalues(NamedTuple):
    """Those that come with the basis: of scale · S_in ⊗ S_out, each side times the root of scale.

    Attributes
    ----------
    s_in, s_out : (d_in,) and (d_out,) tensors, >= 0.
    mean_in, mean_out : () tensors, the mean eigenvalue of each side.
    """

    s_in: torch.Tensor
    s_out: torch.Tensor
    mean_in: torch.Tensor
    mean_out: torch.Tensor

    @property
    def D(self):
        """(d_out, d_in) tensor, s_out s_inᵀ."""
        return self.plus(0.0, 0.0)

    def plus(self, add_in, add_out):
        """(s_out + add_out)(s_in + add_in)ᵀ: of the product with add I on either side."""
        s_in, s_out = self.s_in + _per_block(add_in), self.s_out + _per_block(add_out)
        return s_out[..., :, None] * s_in[..., None, :]


def _per_block(number):
    """Of one number per block, to be added to vectors per block."""
    return number[..., None] if isinstance(number, torch.Tensor) else number


class MeasuredEigenvalues(NamedTuple):
    """Those that are measured in the basis.

    Attributes
    ----------
    D : (d_out, d_in) tensor, >= 0.
    """

    D: torch.Tensor


def corrected_eigenvalues(a, g, Q_in, Q_out):
    """The second moments of the per-example gradient in the basis (EKFAC eq. 10; TEKFAC §3).

    Parameters
    ----------
    a, g : as for `kfac_factors`. Memory: S·N·d_out·d_in numbers when there are positions; callers
        hand in few enough examples at once.
    Q_in : (d_in, k) tensor, orthonormal columns; k = d_in for a whole basis.
    Q_out : (d_out, d_out) tensor, orthogonal.

    Returns
    -------
    (d_out, k) tensor, >= 0. Its sum is tr F, in every whole basis.
    """
    a, g = layer_format(a, g)
    N, T, _ = a.shape
    g = g @ Q_out
    if T == 1:
        return g[:, :, 0].square().sum(0).T @ (a[:, 0] @ Q_in).square() / N
    if projecting_first_is_cheaper(T, Q_out.shape[1], len(g)):
        return (g.mT @ (a @ Q_in)).square().sum((0, 1)) / N
    return (g.mT @ a @ Q_in).square().sum((0, 1)) / N


def eigenvalues_of_gradients(G, Q_in, Q_out):
    """`corrected_eigenvalues` of gradients that have been formed.

    G : (S, N, d_out, d_in) tensor.   Q_in, Q_out : as there.
    """
    return (Q_out.mT @ G @ Q_in).square().sum((0, 1)) / G.shape[1]


def projecting_first_is_cheaper(T, d_out, S=1):
    """Whether to project a and g before forming S gradients per example, or the other way round."""
    return T < S * d_out


def move_eigenvalues(D, Q_in_old, Q_out_old, Q_in_new, Q_out_new):
    """The diagonal, in the new basis, of the matrix that D stood for in the old one.

        D ← (R_out)² D ((R_in)²)ᵀ,    R_in = Q_in_newᵀ Q_in_old,  R_out likewise

    It keeps the sum of D (the trace) and is blind to the signs and order of eigenvectors.

    Parameters
    ----------
    D : (d_out, d_in) tensor.   Q_in_* : (d_in, d_in) tensors.   Q_out_* : (d_out, d_out) tensors.

    Returns
    -------
    (d_out, d_in) tensor.
    """
    R_in, R_out = Q_in_new.mT @ Q_in_old, Q_out_new.mT @ Q_out_old
    return R_out.square() @ D @ R_in.square().mT
