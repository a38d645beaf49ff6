"""Truncated bases by dense algebra: whole bases from NumPy, what is left out shared out at the end.

With Q_in completed by any further columns to a whole basis, and D the eigenvalues in it:

    D[i, j]  for j < k,    r_i = mean of D[i, j] over the d_in − k other j
"""

from dataclasses import dataclass

import numpy as np

from .dense_training import DenseLayer, DenseTraining
from .oracles import vec


def completed(Q):
    """Columns that make an orthonormal set a basis, behind it."""
    return np.hstack([Q, np.linalg.qr(Q, mode="complete")[0][:, Q.shape[1] :]])


def with_mean(D, k):
    """(d_out, d_in) -> (d_out, k + 1): the columns from k on as their mean, if there are any."""
    return D if k == D.shape[1] else np.hstack([D[:, :k], D[:, k:].mean(1, keepdims=True)])


def shared_out(D, k):
    """(d_out, d_in), the columns from k on replaced by their mean."""
    mean = D[:, k:].sum(1, keepdims=True) / max(1, D.shape[1] - k)
    return np.hstack([D[:, :k], np.repeat(mean, D.shape[1] - k, 1)])


def dense(Q_in, Q_out, D):
    """(Q_in ⊗ Q_out) diag(D) (Q_in ⊗ Q_out)ᵀ, the last column of a thin D repeated."""
    d_in, k = Q_in.shape
    if k < d_in:
        D = np.hstack([D[:, :k], np.repeat(D[:, k:], d_in - k, 1)])
    Q = np.kron(completed(Q_in), Q_out)
    return (Q * vec(D)) @ Q.T


def diagonal(F, Q_in, Q_out):
    """D of a matrix in a basis: its diagonal, the mean of what belongs to no column of Q_in."""
    Q = np.kron(completed(Q_in), Q_out)
    D = np.diag(Q.T @ F @ Q).reshape(len(Q_out), len(Q_in), order="F")
    return with_mean(D, Q_in.shape[1])


class TruncatedLayer(DenseLayer):
    """A layer whose smaller input eigenvalues are replaced by their mean, all but k of them."""

    def __init__(self, method, settings, k):
        super().__init__(method, settings)
        self.k = k

    def update(self, step, a, g):
        super().update(step, a, g)
        (Q_in, Q_out), (scale, left, right) = self.bases, self.held
        if len(Q_in) > self.k:
            Q_in = Q_in[:, ::-1]  # largest first
            s_in = np.diag(Q_in.T @ left @ Q_in)[None]
            self.held = (scale, (Q_in * shared_out(s_in, self.k)) @ Q_in.T, right)
            leading = Q_in[:, : self.k]
            self.scaled = dense(leading, Q_out, diagonal(self.scaled, leading, Q_out))


@dataclass
class TruncatedTraining(DenseTraining):
    k: int = 1

    def __post_init__(self):
        super().__post_init__()
        self.layers = {
            module: TruncatedLayer(self.method, self.settings, self.k) for module in self.layers
        }
