"""Corrected eigenvalues, and carrying them into another basis; `reference/rescaling.py` in torch.

    D = E[(Q_outᵀ G_n Q_in)²]       element-wise square; G_n = Σ_t g_nt ā_ntᵀ, example n's gradient

EKFAC calls it S*, TEKFAC calls it Θ. With T positions there are two orders of computing it:

    project, then form      N·(T·d_in² + S·T·d_out² + S·T·d_in·d_out)    multiplications
    form, then project      N·S·(T·d_out² + T·d_in·d_out + d_out·d_in²)  (g is projected at once)

The second is far cheaper when T is large, and for a convolution needs no patches. With T = 1
nothing needs to be formed: G_n has rank one and D = ((g Q_out)²)ᵀ ((a Q_in)²) / N, one product.

With a truncated Q_in, (d_in, k), D has a column more: what is left of every row of Q_outᵀ G_n,

    D[i, k] = E[ ‖(Q_outᵀ G_n)_i‖² − Σ_j (Q_outᵀ G_n Q_in)_ij² ],

so that its sum is tr F all the same.
"""

from functools import partial

import torch

from tekfac_edu.optim.factors import layer_format
from tekfac_edu.optim.patches import kernel_rows, rows_of_basis


def corrected_eigenvalues(a, g, Q_in, Q_out):
    """The second moments of the per-example gradient in the basis (EKFAC eq. 10; TEKFAC §3).

    Parameters
    ----------
    a, g : as for `kfac_factors`. Memory: S·N·d_out·d_in numbers when there are positions; callers
        hand in few enough examples at once.
    Q_in : (d_in, d_in) tensor, orthogonal; or truncated, (d_in, k).
    Q_out : (d_out, d_out) tensor, orthogonal.

    Returns
    -------
    (d_out, d_in) or (d_out, k + 1) tensor, >= 0. Its sum is tr F, in every basis.
    """
    a, g = layer_format(a, g)
    N, T, _ = a.shape
    g = g @ Q_out
    if T > 1 and not projecting_first_is_cheaper(T, len(Q_out), len(g)):
        return second_moments(g.mT @ a, Q_in)
    projected = a @ Q_in
    if T == 1:
        g_squared = g[:, :, 0].square().sum(0).T
        D = g_squared @ projected[:, 0].square() / N
        total = partial(torch.mv, g_squared / N, a[:, 0].square().sum(-1))
    else:
        D = (g.mT @ projected).square().sum((0, 1)) / N
        total = partial(torch.sum, a @ a.mT @ g * g / N, (0, 1, 2))
    return D if projected.shape[-1] == a.shape[-1] else with_rest(D, total())


def second_moments(G, Q_in):
    """D of gradients whose output side is in the basis already.

    G : (S, N, d_out, d_in) tensor, Q_outᵀ G_n.   Q_in : (d_in, d_in) or (d_in, k) tensor.
    """
    N = G.shape[1]
    D = (G @ Q_in).square().sum((0, 1)) / N
    return D if Q_in.shape[1] == len(Q_in) else with_rest(D, G.square().sum((0, 1, 3)) / N)


def with_rest(D, total):
    """D: (d_out, k) with one column more, so that its rows have the sums `total`: (d_out,)."""
    return torch.cat([D, (total - D.sum(1)).clamp(min=0)[:, None]], 1)


def convolution_gradients(module, x, g, has_bias, Q_in, Q_out):
    """Q_outᵀ G_n of every example, formed kernel row by kernel row, without patches.

    Parameters
    ----------
    module : Conv1d or Conv2d.   x : (N, C, *image) tensor, its input.
    g : (S, N, d_out, *image) tensor, the gradients at its output.
    Q_in, Q_out : as for `corrected_eigenvalues`.

    Returns
    -------
    G : (S, N, d_out, d_in) tensor, its columns in the order of `kernel_rows`.
    Q_in : in that order, so that G Q_in is what it would be in the order of the weight.
    """
    g = Q_out.mT @ g.flatten(3)
    G = [g @ row.mT for row in kernel_rows(module, x)]
    rows = rows_of_basis(module, Q_in)
    if has_bias:
        G.append(g.sum(3, keepdim=True))
        rows.append(Q_in[-1:])
    return torch.cat(G, 3), torch.cat(rows)


def projecting_first_is_cheaper(T, d_out, S=1):
    """Whether to project a and g before forming S gradients per example, or the other way round."""
    return T < S * d_out


def move_eigenvalues(D, Q_in_old, Q_out_old, Q_in_new, Q_out_new):
    """The diagonal, in the new basis, of the matrix that D stood for in the old one.

        D ← (R_out)² D ((R_in)²)ᵀ,    R_in = Q_in_newᵀ Q_in_old,  R_out likewise

    It keeps the sum of D (the trace) and is blind to the signs and order of eigenvectors. Where the
    old Q_in is truncated, a new direction gets the evenly spread rest by as much of it as lies
    outside of the old ones; where the new one is, its last column is what is left of every row.

    Parameters
    ----------
    D : (d_out, d_in) tensor, or (d_out, k + 1).   Q_in_* : (d_in, d_in) tensors, or (d_in, k).
    Q_out_* : (d_out, d_out) tensors.

    Returns
    -------
    (d_out, d_in) tensor, or (d_out, k + 1) with the new k.
    """
    d_in, k_old = Q_in_old.shape
    shares = (Q_in_new.T @ Q_in_old).square().T
    if k_old < d_in:
        outside = (1 - shares.sum(0, keepdim=True)).clamp(min=0)
        shares = torch.cat([shares, outside / (d_in - k_old)])
    D = (Q_out_new.T @ Q_out_old).square() @ D
    moved = D @ shares
    return moved if Q_in_new.shape[1] == d_in else with_rest(moved, D.sum(1))
