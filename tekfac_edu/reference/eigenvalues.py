"""Eigenvalues that are measured: the best diagonal for a basis, and what becomes of it in another.

    D = E[(Q_outᵀ G_n Q_in)²]       element-wise square; G_n the true gradient of example n

EKFAC calls it S*, TEKFAC calls it Θ. It is the diagonal of QᵀFQ for Q = Q_in ⊗ Q_out, so it is the
diagonal that brings Q diag(D) Qᵀ closest to F, whatever the orthogonal Q (EKFAC Lemma 1).
Beside chapters 6 and 8.
"""

import numpy as np

from tekfac_edu.reference.inputs import finite_array, layer_inputs


def corrected_eigenvalues(a, g, Q_in, Q_out):
    """The second moments of the per-example gradient in the basis (EKFAC eq. 10; TEKFAC §3).

    Parameters
    ----------
    a, g : as for `kfac_factors`. Positions are summed before squaring: G_n = Σ_t g_nt ā_ntᵀ.
    Q_in : (d_in, d_in) array, orthogonal.   Q_out : (d_out, d_out) array, orthogonal.

    Returns
    -------
    (d_out, d_in) array, >= 0. Its sum is tr F, in every basis.
    """
    a, g = layer_inputs(a, g)
    d_in, d_out = a.shape[-1], g.shape[-1]
    Q_in = finite_array("Q_in", Q_in, shape=(d_in, d_in))
    Q_out = finite_array("Q_out", Q_out, shape=(d_out, d_out))
    return _second_moments(a, g, Q_in, Q_out)


def _second_moments(a, g, Q_in, Q_out):
    """a: (N, T, d_in), g: (S, N, T, d_out)."""
    G = np.einsum("snto,nti->snoi", g @ Q_out, a @ Q_in)
    return np.sum(G**2, axis=(0, 1)) / len(a)


def move_eigenvalues(D, Q_in_old, Q_out_old, Q_in_new, Q_out_new):
    """The diagonal, in the new basis, of the matrix that D stood for in the old one.

        D ← (R_out)² D ((R_in)²)ᵀ,    R_in = Q_in_newᵀ Q_in_old,  R_out likewise

    with entries squared one by one. A running average of D has to be moved like this when the basis
    turns. It keeps the sum of D (the trace) and is blind to the signs and order of eigenvectors.

    Parameters
    ----------
    D : (d_out, d_in) array.   Q_in_* : (d_in, d_in) arrays.   Q_out_* : (d_out, d_out) arrays.

    Returns
    -------
    (d_out, d_in) array.
    """
    Q_in_old = finite_array("Q_in_old", Q_in_old, square=True)
    Q_out_old = finite_array("Q_out_old", Q_out_old, square=True)
    D = finite_array("D", D, shape=(len(Q_out_old), len(Q_in_old)))
    Q_in_new = finite_array("Q_in_new", Q_in_new, shape=Q_in_old.shape)
    Q_out_new = finite_array("Q_out_new", Q_out_new, shape=Q_out_old.shape)
    return _moved(D, Q_in_old, Q_out_old, Q_in_new, Q_out_new)


def _moved(D, Q_in_old, Q_out_old, Q_in_new, Q_out_new):
    R_in, R_out = Q_in_new.T @ Q_in_old, Q_out_new.T @ Q_out_old
    return R_out**2 @ D @ (R_in**2).T
