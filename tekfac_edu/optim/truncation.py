"""Truncated bases: of a layer with many inputs only the k leading eigenvectors on that side.

What F has besides them, in output direction i, is spread evenly over the d_in − k input directions
that are left, so tr F is kept: r_i each. D has one column more than the basis, r, and

    direction = Q_out [ (Z − C Q_inᵀ) / r_damped + (C / D_damped) Q_inᵀ ]   Z = Q_outᵀ M, C = Z Q_in

Everything that differs from a whole basis is in this file (ours; the leading eigenvectors without
`eigh`: Halko, Martinsson & Tropp 2011).
"""

import torch

from tekfac_edu.optim import eigenvalues
from tekfac_edu.optim.basis import Basis
from tekfac_edu.optim.eigenbasis import eigenbasis, qr_iteration
from tekfac_edu.optim.factors import layer_format

COLD_STEPS = 4  # of orthogonal iteration, from random columns to a first truncated basis


class TruncatedBasis(Basis):
    """A `Basis` whose Q_in is (d_in, k), orthonormal columns; D is (d_out, k + 1)."""

    __slots__ = ()

    @property
    def shape(self):
        *front, k = super().shape
        return (*front, k + 1)

    @property
    def left_out(self):
        """How many input directions share the rest."""
        return self.Q_in.shape[-2] - self.Q_in.shape[-1]

    @staticmethod
    def corrected_eigenvalues(a, g, Q_in, Q_out):
        """As for a whole basis, the last column for the rest of each row of Q_outᵀ G_n:

        D[i, k] (d_in − k) = E[ ‖(Q_outᵀ G_n)_i‖² − Σ_j (Q_outᵀ G_n Q_in)_ij² ]
        """
        a, g = layer_format(a, g)
        N, T, _ = a.shape
        D = eigenvalues.corrected_eigenvalues(a, g, Q_in, Q_out)
        g = g @ Q_out
        if T == 1:
            total = g[:, :, 0].square().sum(0).T @ a[:, 0].square().sum(-1) / N
        else:
            total = (a @ a.mT @ g * g).sum((0, 1, 2)) / N
        return with_rest(D, total, len(Q_in))

    @staticmethod
    def second_moments(G, Q_in):
        """As for a whole basis, with the rest."""
        total = G.square().sum((0, 1, 3)) / G.shape[1]
        return with_rest(eigenvalues.second_moments(G, Q_in), total, len(Q_in))

    def whole(self, D):
        """(d_out, d_in) tensor: the rest written out, in the last columns."""
        rest = D[..., -1:].expand(*D.shape[:-1], self.left_out)
        return torch.cat([D[..., :-1], rest], -1)

    @staticmethod
    def precondition(M, Q_in, Q_out, D_damped, precision="full"):
        """The formula above; precision as for a whole basis."""
        if precision == "bfloat16":
            Q_in, Q_out = Q_in.bfloat16(), Q_out.bfloat16()
        Z = Q_out.mT @ M.to(Q_out.dtype)
        C = Z @ Q_in
        for_the_rest = (1 / D_damped[..., -1:]).to(Z.dtype)  # rounded here: it has to cancel below
        C = C * (1 / D_damped[..., :-1] - for_the_rest)
        return (Q_out @ (Z * for_the_rest + C.to(Z.dtype) @ Q_in.mT)).to(M.dtype)


def basis_of(Q_in, Q_out):
    """The `Basis` of these eigenvectors, truncated if Q_in has fewer columns than rows."""
    kind = Basis if Q_in.shape[-2] == Q_in.shape[-1] else TruncatedBasis
    return kind(Q_in, Q_out)


def with_rest(D, total, d_in):
    """D: (d_out, k) with one column more, so that rows have the sums `total`: (d_out,)."""
    rest = (total - D.sum(-1)).clamp(min=0) / (d_in - D.shape[-1])
    return torch.cat([D, rest[..., None]], -1)


def moved(D, old, new):
    """D of one `Basis` in another: `move_eigenvalues`, and where either of them is truncated.

    A new direction gets of the old one's evenly spread rest by as much of it as lies outside of the
    old directions; a new rest is what is left of every row.
    """
    if type(old) is type(new) is Basis:
        return eigenvalues.move_eigenvalues(D, *old, *new)
    R_in, R_out = new.Q_in.mT @ old.Q_in, new.Q_out.mT @ old.Q_out
    shares, D = R_in.square().mT, R_out.square() @ D
    sums = D.sum(-1)
    if isinstance(old, TruncatedBasis):
        outside = (1 - shares.sum(-2, keepdim=True)).clamp(min=0)
        shares = torch.cat([shares, outside], -2)
        sums = sums + (old.left_out - 1) * D[..., -1]
    D = D @ shares
    truncated = isinstance(new, TruncatedBasis)
    return with_rest(D, sums, new.Q_in.shape[-2]) if truncated else D


def leading_eigenbasis(S, k):
    """Eigenvalues and eigenvectors as `eigenbasis` gives them, the k largest alone.

    Returns
    -------
    eigenvalues : (k + 1,) tensor, ascending but for the last: the mean of those left out.
    Q : (d, k) tensor, orthonormal columns.
    """
    s, Q = eigenbasis(S)
    return leading(s, k), Q[..., -k:].contiguous()


def leading(s, k):
    """(k + 1,): the last k of (d,) numbers, and the mean of the others; s itself if k = d."""
    if k == s.shape[-1]:
        return s
    return torch.cat([s[..., -k:], s[..., :-k].mean(-1, keepdim=True)], -1)


def first_leading_basis(S, k):
    """An approximate `leading_eigenbasis` without `eigh`: orthogonal iteration from random columns.

    The columns are the same every time (Halko, Martinsson and Tropp 2011, Algorithm 4.4).

    Returns
    -------
    (d, k) tensor, orthonormal columns.
    """
    draw = torch.Generator(S.device).manual_seed(0)
    Q = torch.randn(S.shape[-1], k, generator=draw, dtype=S.dtype, device=S.device)
    Q = Q.expand(*S.shape[:-1], k)
    for _ in range(COLD_STEPS):
        Q = qr_iteration(S, Q)
    return Q
