"""The one form that all four methods share, and its basis; `reference/eigenbasis.py` in torch.

    F ≈ (Q_in ⊗ Q_out) diag(D) (Q_in ⊗ Q_out)ᵀ          D: (d_out, d_in)

    direction = Q_out [ (Q_outᵀ M Q_in) / D_damped ] Q_inᵀ

A truncated Q_in, (d_in, k), holds the leading eigenvectors only. What F has besides them, in output
direction i, is spread evenly over the d_in − k input directions that are left: r_i each. So

    direction = Q_out [ (Z − C Q_inᵀ) / r_damped + (C / D_damped) Q_inᵀ ]   Z = Q_outᵀ M, C = Z Q_in

and whatever has one column per input direction has k + 1 here; the last one counts for the rest.

A decomposition may fail on a matrix that training has made singular (dead units). It is then tried
once more, in float64 and with a ridge; what happens if that fails too is the caller's to decide.
"""

import torch

COLD_STEPS = 4  # of orthogonal iteration, from random columns to a first truncated basis
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
    S : (d, d) tensor, symmetric positive semi-definite.
    Q : (d, d) tensor, orthogonal; or (d, k), orthonormal columns.

    Returns
    -------
    Tensor of Q's shape, orthogonal to rounding whether or not it has converged; largest direction
    first.
    """
    SQ = S @ Q
    largest_first = (Q * SQ).sum(0).argsort(descending=True, stable=True)
    Q_new, R = torch.linalg.qr(SQ[:, largest_first])
    return Q_new * torch.where(R.diagonal() < 0, -1.0, 1.0).to(Q_new.dtype)


def leading_eigenbasis(S, k):
    """Eigenvalues and eigenvectors as `eigenbasis` gives them, the k largest alone.

    Returns
    -------
    eigenvalues : (k + 1,) tensor, ascending but for the last: the sum of those left out.
    Q : (d, k) tensor, orthonormal columns.
    """
    eigenvalues, Q = eigenbasis(S)
    rest = eigenvalues[:-k].sum(0, keepdim=True)
    return torch.cat([eigenvalues[-k:], rest]), Q[:, -k:].contiguous()


def first_leading_basis(S, k):
    """An approximate `leading_eigenbasis` without `eigh`: orthogonal iteration from random columns.

    The columns are the same every time (Halko, Martinsson and Tropp 2011, Algorithm 4.4).

    Returns
    -------
    (d, k) tensor, orthonormal columns.
    """
    draw = torch.Generator(S.device).manual_seed(0)
    Q = torch.randn(len(S), k, generator=draw, dtype=S.dtype, device=S.device)
    for _ in range(COLD_STEPS):
        Q = qr_iteration(S, Q)
    return Q


def precondition(M, Q_in, Q_out, D_damped, precision="full"):
    """Q_out [ (Q_outᵀ M Q_in) / D_damped ] Q_inᵀ: (..., d_out, d_in) -> (..., d_out, d_in).

    Q_in, D_damped : (d_in, d_in) and (d_out, d_in); or, truncated, (d_in, k) and (d_out, k + 1).
    precision : "bfloat16": factors of the four products are rounded to it, and divided is in full.
    """
    if precision == "bfloat16":
        Q_in, Q_out = Q_in.bfloat16(), Q_out.bfloat16()
    Z = Q_out.mT @ M.to(Q_out.dtype)
    C = Z @ Q_in
    k = Q_in.shape[-1]
    if D_damped.shape[-1] == k:
        return (Q_out @ (C / D_damped).to(Z.dtype) @ Q_in.mT).to(M.dtype)
    for_the_rest = (1 / D_damped[..., k:]).to(Z.dtype)  # rounded here: it has to cancel below
    C = C * (1 / D_damped[..., :k] - for_the_rest)
    return (Q_out @ (Z * for_the_rest + C.to(Z.dtype) @ Q_in.mT)).to(M.dtype)
