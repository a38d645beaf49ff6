"""The one form that all four methods share, and its basis; `reference/eigenbasis.py` in torch.

    F ≈ (Q_in ⊗ Q_out) diag(D) (Q_in ⊗ Q_out)ᵀ          D: (d_out, d_in)

    direction = Q_out [ (Q_outᵀ M Q_in) / D_damped ] Q_inᵀ

A decomposition may fail on a matrix that training has made singular (dead units). It is then tried
once more, in float64 and with a ridge; what happens if that fails too is the caller's to decide.
"""

import torch

RIDGE = 1e-6  # of the mean eigenvalue: far below any useful damping, far above float64's rounding


class DecompositionFailed(RuntimeError):
    """A factor is not finite, or its eigendecomposition failed twice."""


def eigenbasis(S):
    """Eigenvalues and eigenvectors of a symmetric positive semi-definite matrix.

    Parameters
    ----------
    S : (d, d) tensor, float32 or float64.

    Returns
    -------
    eigenvalues : (d,) tensor, ascending, >= 0 (rounding below zero is set to zero).
    Q : (d, d) tensor, orthogonal; eigenvectors are its columns. Both in S's dtype.

    Raises
    ------
    DecompositionFailed
        If S is not finite, or `torch.linalg.eigh` failed, with a ridge and in float64 too.
    """
    try:
        eigenvalues, Q = _finite_eigh(S)
    except torch.linalg.LinAlgError as first:
        ridge = RIDGE * S.diagonal().double().mean()
        identity = torch.eye(len(S), dtype=torch.float64, device=S.device)
        try:
            eigenvalues, Q = _finite_eigh(S.double() + ridge * identity)
        except torch.linalg.LinAlgError:
            raise DecompositionFailed(str(first)) from first
        eigenvalues, Q = (eigenvalues - ridge).to(S.dtype), Q.to(S.dtype)
    return eigenvalues.clamp(min=0), Q


def _finite_eigh(S):
    """eigh, with an error also where LAPACK gives NaN and none: seen in float32 with dead units."""
    eigenvalues, Q = torch.linalg.eigh(S)
    if not Q.isfinite().all():
        raise torch.linalg.LinAlgError("eigh gave numbers that are not finite")
    return eigenvalues, Q


def qr_iteration(S, Q):
    """One warm-started step of orthogonal iteration, Q ← qr(S Q): a cheap, approximate eigenbasis.

    The columns are first put in descending order of qᵀSq. In another order the leading columns,
    which QR leaves almost alone, drown the later ones, and a step makes the basis worse.

    Parameters
    ----------
    S : (d, d) tensor, symmetric positive semi-definite.   Q : (d, d) tensor, orthogonal.

    Returns
    -------
    (d, d) tensor, orthogonal to rounding whether or not it has converged; largest direction first.
    """
    SQ = S @ Q
    largest_first = (Q * SQ).sum(0).argsort(descending=True, stable=True)
    Q_new, R = torch.linalg.qr(SQ[:, largest_first])
    return Q_new * torch.where(R.diagonal() < 0, -1.0, 1.0).to(Q_new.dtype)


def precondition(M, Q_in, Q_out, D_damped, precision="full"):
    """Q_out [ (Q_outᵀ M Q_in) / D_damped ] Q_inᵀ: (..., d_out, d_in) -> (..., d_out, d_in).

    precision : "bfloat16": factors of the four products are rounded to it, and divided is in full.
    """
    if precision == "full":
        return Q_out @ ((Q_out.mT @ M @ Q_in) / D_damped) @ Q_in.mT
    Q_in, Q_out = Q_in.bfloat16(), Q_out.bfloat16()
    rotated = (Q_out.mT @ M.bfloat16() @ Q_in).to(D_damped.dtype)
    return (Q_out @ (rotated / D_damped).bfloat16() @ Q_in.mT).to(M.dtype)
