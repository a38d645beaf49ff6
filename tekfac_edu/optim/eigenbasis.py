"""The one form that all four methods share, and its basis; `reference/eigenbasis.py` in torch.

    F ≈ (Q_in ⊗ Q_out) diag(D) (Q_in ⊗ Q_out)ᵀ          D: (d_out, d_in)

    direction = Q_out [ (Q_outᵀ M Q_in) / D_damped ] Q_inᵀ

A decomposition may fail on a matrix that training has made singular (dead units). It is then tried
once more, in float64 and with a ridge; what happens if that fails too is the caller's to decide.
Every tensor may have axes more in front, of blocks or of layers that are worked on together.
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
        ridge = RIDGE * S.diagonal(dim1=-2, dim2=-1).double().mean(-1)[..., None]
        identity = torch.eye(S.shape[-1], dtype=torch.float64, device=S.device)
        try:
            eigenvalues, Q = _finite_eigh(S.double() + ridge[..., None] * identity)
        except torch.linalg.LinAlgError:
            raise DecompositionFailed(str(first)) from first
        eigenvalues, Q = (eigenvalues - ridge).to(S.dtype), Q.to(S.dtype)
    return eigenvalues.clamp(min=0), Q


def _finite_eigh(S):
    """eigh, with an error also where LAPACK gives NaN and none: seen in float32 with dead units."""
    eigenvalues, Q = torch.linalg.eigh(S)
    if not (eigenvalues.isfinite().all() & Q.isfinite().all()):
        raise torch.linalg.LinAlgError("eigh gave numbers that are not finite")
    return eigenvalues, Q


def qr_iteration(S, Q):
    """One warm-started step of orthogonal iteration, Q ← qr(S Q): a cheap, approximate eigenbasis.

    The columns are first put in descending order of qᵀSq. In another order the leading columns,
    which QR leaves almost alone, drown the later ones, and a step makes the basis worse.

    Parameters
    ----------
    S : (d, d) tensor, symmetric positive semi-definite.
    Q : (d, d) tensor, orthogonal; or (d, k), orthonormal columns.

    Returns
    -------
    Tensor of Q's shape, orthogonal to rounding whether or not it has converged; largest direction
    first.
    """
    SQ = S @ Q
    largest_first = (Q * SQ).sum(-2, keepdim=True).argsort(dim=-1, descending=True, stable=True)
    Q_new, R = torch.linalg.qr(SQ.take_along_dim(largest_first, -1))
    signs = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(Q_new.dtype)
    return Q_new * signs[..., None, :]


def precondition(M, Q_in, Q_out, D_damped, precision="full"):
    """Q_out [ (Q_outᵀ M Q_in) / D_damped ] Q_inᵀ: (d_out, d_in) -> (d_out, d_in).

    precision : "bfloat16": the factors of the four products are rounded to it; divided is in full.
    """
    if precision == "bfloat16":
        Q_in, Q_out = Q_in.bfloat16(), Q_out.bfloat16()
    turned = Q_out.mT @ M.to(Q_out.dtype) @ Q_in
    return (Q_out @ (turned / D_damped).to(Q_out.dtype) @ Q_in.mT).to(M.dtype)
