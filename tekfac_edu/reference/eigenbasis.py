"""The one form that all four methods share, and how its basis is found.

    F ≈ (Q_in ⊗ Q_out) diag(D) (Q_in ⊗ Q_out)ᵀ          D: (d_out, d_in), entry by entry of vec(D)

    (F + damping)⁻¹ vec(M)  =  vec( Q_out [ (Q_outᵀ M Q_in) / D_damped ] Q_inᵀ )

The methods differ in where Q comes from and in what D is; nothing else. Beside chapters 4 to 8.
"""

import numpy as np

from tekfac_edu.reference.damping import nonnegative_damping
from tekfac_edu.reference.inputs import matrix_of_shape, square_matrix
from tekfac_edu.reference.kronecker import vec


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
    S = square_matrix("S", S)
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
    S = square_matrix("S", S)
    Q = matrix_of_shape("Q", Q, S.shape)
    largest_first = np.argsort(-np.einsum("ij,ik,kj->j", Q, S, Q, optimize=True))
    Q_new, R = np.linalg.qr(S @ Q[:, largest_first])
    return Q_new * np.where(np.diag(R) < 0, -1.0, 1.0)


def dense_from_eigenbasis(Q_in, Q_out, D):
    """(Q_in ⊗ Q_out) diag(vec D) (Q_in ⊗ Q_out)ᵀ, formed: (d_in·d_out, d_in·d_out)."""
    Q = np.kron(Q_in, Q_out)
    return (Q * vec(D)) @ Q.T


def precondition_corrected(M, Q_in, Q_out, D, damping):
    """Q_out [ (Q_outᵀ M Q_in) / (D + λ) ] Q_inᵀ: solve with the dense form, never forming it.

    Parameters
    ----------
    M : (d_out, d_in) array, a gradient.   D : (d_out, d_in) array, >= 0.   damping : λ >= 0.

    Raises
    ------
    ValueError
        If damping is negative or not finite, or zero while D is singular; if M has another shape.
    """
    damping = nonnegative_damping(damping)
    _refuse_singular(D, damping)
    return _divide(M, Q_in, Q_out, D + damping)


def precondition_factored(M, Q_in, Q_out, s_in, s_out, add_in, add_out):
    """Solve with (S_in + add_in I) ⊗ (S_out + add_out I), given the two eigendecompositions.

    Parameters
    ----------
    M : (d_out, d_in) array, a gradient.
    s_in : (d_in,) array, >= 0.   s_out : (d_out,) array, >= 0.
    add_in, add_out : floats >= 0, each factor's share of the damping.

    Raises
    ------
    ValueError
        If a factor that gets no damping is singular; if M has another shape.
    """
    _refuse_singular(s_in, add_in)
    _refuse_singular(s_out, add_out)
    return _divide(M, Q_in, Q_out, np.outer(s_out + add_out, s_in + add_in))


def _divide(M, Q_in, Q_out, D_damped):
    M = matrix_of_shape("M", M, D_damped.shape)
    return Q_out @ ((Q_out.T @ M @ Q_in) / D_damped) @ Q_in.T


def _refuse_singular(spectrum, damping):
    """Singular to rounding: numpy.linalg.matrix_rank's threshold, largest · size · epsilon."""
    threshold = spectrum.max() * max(spectrum.shape) * np.finfo(float).eps
    if damping == 0 and spectrum.min() <= threshold:
        raise ValueError(
            f"damping is 0 and the curvature is singular (smallest eigenvalue "
            f"{spectrum.min():.1e}, largest {spectrum.max():.1e}); give damping > 0"
        )
