"""Corrected eigenvalues, and carrying them into another basis; `reference/rescaling.py` in torch.

    D = E[(Q_outᵀ G_n Q_in)²]       element-wise square; G_n = Σ_t g_nt ā_ntᵀ, example n's gradient

EKFAC calls it S*, TEKFAC calls it Θ. With T positions there are two orders of computing it:

    project, then form      N·(T·d_in² + S·T·d_out² + S·T·d_in·d_out)    multiplications
    form, then project      N·S·(T·d_out² + T·d_in·d_out + d_out·d_in²)  (g is projected at once)

The second is far cheaper when T is large, and for a convolution needs no patches. With T = 1
nothing needs to be formed: G_n has rank one and D = ((g Q_out)²)ᵀ ((a Q_in)²) / N, one product.
"""

from tekfac_edu.optim.factors import layer_format
from tekfac_edu.optim.patches import kernel_rows, rows_of_basis


def corrected_eigenvalues(a, g, Q_in, Q_out):
    """The second moments of the per-example gradient in the basis (EKFAC eq. 10; TEKFAC §3).

    Parameters
    ----------
    a, g : as for `kfac_factors`. Memory: S·N·d_out·d_in numbers when there are positions; callers
        hand in few enough examples at once.
    Q_in : (d_in, d_in) tensor, orthogonal.   Q_out : (d_out, d_out) tensor, orthogonal.

    Returns
    -------
    (d_out, d_in) tensor, >= 0. Its sum is tr F, in every basis.
    """
    a, g = layer_format(a, g)
    N, T, _ = a.shape
    if T == 1:
        g_squared = (g @ Q_out).square().sum(0)
        return g_squared[:, 0].T @ (a @ Q_in)[:, 0].square() / N
    g = g @ Q_out
    if projecting_first_is_cheaper(T, len(Q_out), len(g)):
        G = g.mT @ (a @ Q_in)
    else:
        G = (g.mT @ a) @ Q_in
    return G.square().sum((0, 1)) / N


def convolution_gradients(module, x, g, has_bias, Q_in, Q_out):
    """Q_outᵀ G_n Q_in of every example, formed row by row of the kernel, without patches.

    Parameters
    ----------
    module : Conv1d or Conv2d.   x : (N, C, *image) tensor, its input.
    g : (S, N, d_out, *image) tensor, the gradients at its output.
    Q_in, Q_out : as for `corrected_eigenvalues`.

    Returns
    -------
    (S, N, d_out, d_in) tensor
    """
    g = Q_out.mT @ g.flatten(3)
    S, N, d_out, _ = g.shape
    G = Q_in.new_zeros(S * N * d_out, len(Q_in))
    for row, basis in zip(kernel_rows(module, x), rows_of_basis(module, Q_in), strict=True):
        G.addmm_((g @ row.mT).flatten(0, 2), basis)
    if has_bias:
        G.addr_(g.sum(3).flatten(), Q_in[-1])
    return G.view(S, N, d_out, -1)


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
    R_in, R_out = Q_in_new.T @ Q_in_old, Q_out_new.T @ Q_out_old
    return R_out.square() @ D @ R_in.square().T
