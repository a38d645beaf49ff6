"""The one form that all four methods share, and how its basis is found.

    F ≈ (Q_in ⊗ Q_out) diag(D) (Q_in ⊗ Q_out)ᵀ          D: (d_out, d_in), entry by entry of vec(D)

    (F + damping)⁻¹ vec(M)  =  vec( Q_out [ (Q_outᵀ M Q_in) / D_damped ] Q_inᵀ )

The methods differ in where Q comes from and in what D is; nothing else. Beside chapters 4 to 8.
"""

import numpy as np

from tekfac_edu.reference.inputs import finite_array


def eigenbasis(S):
    """Eigenvalues and eigenvectors of a symmetric positive semi-definite matrix.

    Parameters
    ----------
    S : (d, d) array.

    Returns
    -------
    eigenvalues : (d,) array, ascending, >= 0 (rounding below zero is set to zero).
    Q : (d, d) array, orthogonal; eigenvectors are its columns.

    Raises
    ------
    ValueError
        If S is not symmetric, or an eigenvalue is negative beyond rounding.
    """
    S = finite_array("S", S, square=True)
    largest = np.abs(S).max()
    if np.abs(S - S.T).max() > 1e-10 * largest:
        raise ValueError(
            f"S must be symmetric; it differs from its transpose by up to "
            f"{np.abs(S - S.T).max():.1e} (largest entry {largest:.1e})"
        )
    eigenvalues, Q = np.linalg.eigh((S + S.T) / 2)
    rounding = len(S) * np.finfo(float).eps * np.abs(eigenvalues).max()
    if eigenvalues[0] < -10 * rounding:
        raise ValueError(
            f"S must be positive semi-definite; its smallest eigenvalue is {eigenvalues[0]:.1e}"
        )
    return np.maximum(eigenvalues, 0), Q


def qr_iteration(S, Q):
    """One warm-started step of orthogonal iteration, Q ← qr(S Q): a cheap, approximate eigenbasis.

    The columns are first put in descending order of qᵀSq. In another order the leading columns,
    which QR leaves almost alone, drown the later ones, and a step makes the basis worse.

    Parameters
    ----------
    S : (d, d) array, symmetric positive semi-definite.
    Q : (d, d) array, orthogonal: the previous basis.

    Returns
    -------
    (d, d) array, orthogonal to rounding whether or not it has converged; largest direction first.
    """
    S = finite_array("S", S, square=True)
    Q = finite_array("Q", Q, shape=S.shape)
    largest_first = np.argsort(-np.einsum("ij,ik,kj->j", Q, S, Q, optimize=True))
    Q_new, R = np.linalg.qr(S @ Q[:, largest_first])
    return Q_new * np.where(np.diag(R) < 0, -1.0, 1.0)


def precondition(M, Q_in, Q_out, D_damped):
    """Q_out [ (Q_outᵀ M Q_in) / D_damped ] Q_inᵀ: solve with the dense form, never forming it.

    Parameters
    ----------
    M : (d_out, d_in) array, a gradient.   D_damped : (d_out, d_in) array, > 0, in units of F.
    Q_in : (d_in, d_in) array, orthogonal.   Q_out : (d_out, d_out) array, orthogonal.

    Returns
    -------
    (d_out, d_in) array, M's units over those of F.
    """
    M = finite_array("M", M, shape=np.shape(D_damped))
    if not np.min(D_damped) > 0:
        raise ValueError(
            f"D_damped must be > 0; its smallest entry is {np.min(D_damped):.1e}: give more damping"
        )
    d_out, d_in = M.shape
    if np.shape(Q_in) != (d_in, d_in) or np.shape(Q_out) != (d_out, d_out):
        raise ValueError(
            f"Q_in and Q_out must have shapes {(d_in, d_in)} and {(d_out, d_out)} for this M; "
            f"their shapes are {np.shape(Q_in)} and {np.shape(Q_out)}"
        )
    return Q_out @ ((Q_out.T @ M @ Q_in) / D_damped) @ Q_in.T
