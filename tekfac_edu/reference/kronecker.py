"""Kronecker algebra: the two flattenings, products never formed, and the nearest product.

`vec` stacks COLUMNS, as the papers do, everywhere in this package. For M of shape (d_out, d_in)

    (A ⊗ B) vec(M) = vec(B M Aᵀ)            A: (d_in, d_in),  B: (d_out, d_out)

so the first factor acts on inputs and the second on outputs. NumPy and PyTorch flatten rows, which
swaps the factors; `to_row_order` is the one place where that is converted.
"""

import numpy as np

from tekfac_edu.arguments import whole_number
from tekfac_edu.reference.inputs import finite_array


def vec(M):
    """Stack the columns of M: (d_out, d_in) -> (d_in * d_out,)."""
    return finite_array("M", M, ndim=2).flatten(order="F")


def unvec(v, d_out, d_in):
    """The matrix whose stacked columns are v: (d_in * d_out,) -> (d_out, d_in)."""
    d_out, d_in = whole_number("d_out", d_out, 1), whole_number("d_in", d_in, 1)
    return finite_array("v", v, shape=(d_in * d_out,)).reshape((d_out, d_in), order="F")


def stack_vecs(matrices):
    """One vector for a whole network: the vecs of its layers, one after another."""
    matrices = [finite_array(f"matrices[{k}]", M, ndim=2) for k, M in enumerate(matrices)]
    if not matrices:
        raise ValueError("matrices must hold at least one matrix; got none")
    return np.concatenate([vec(M) for M in matrices])


def split_vecs(v, shapes):
    """Undo `stack_vecs`: the (d_out, d_in) matrices of those shapes."""
    sizes = [d_out * d_in for d_out, d_in in shapes]
    v = finite_array("v", v, shape=(sum(sizes),))
    parts = np.split(v, np.cumsum(sizes)[:-1])
    return [unvec(part, *shape) for part, shape in zip(parts, shapes, strict=True)]


def kron_apply(A, B, M):
    """(A ⊗ B) vec(M) as a matrix, B M Aᵀ: O(d³) work where the product itself has d⁴ entries.

    Parameters
    ----------
    A : (p, d_in) array.   B : (q, d_out) array.   M : (d_out, d_in) array.

    Returns
    -------
    (q, p) array.
    """
    A, B, M = (finite_array(name, x, ndim=2) for name, x in (("A", A), ("B", B), ("M", M)))
    if M.shape != (B.shape[1], A.shape[1]):
        raise ValueError(
            f"M must have shape (columns of B, columns of A) = {(B.shape[1], A.shape[1])}; "
            f"its shape is {M.shape}"
        )
    return B @ M @ A.T


def dense_from_eigenbasis(Q_in, Q_out, D):
    """(Q_in ⊗ Q_out) diag(vec D) (Q_in ⊗ Q_out)ᵀ, formed: (d_in·d_out, d_in·d_out)."""
    Q = np.kron(Q_in, Q_out)
    return (Q * vec(D)) @ Q.T


def _as_blocks(F, d_in, d_out):
    """F with its row i·d_out + o and column j·d_out + p as [i, o, j, p]."""
    d_in, d_out = whole_number("d_in", d_in, 1), whole_number("d_out", d_out, 1)
    size = d_in * d_out
    return finite_array("F", F, shape=(size, size)).reshape(d_in, d_out, d_in, d_out)


def to_row_order(F, d_in, d_out):
    """The same quadratic form for row-flattened matrices: E[Λ ⊗ Γ] -> E[Γ ⊗ Λ].

    With `m = vec(M)` and `r = M.ravel()`: `m @ F @ m == r @ to_row_order(F, ...) @ r`.
    """
    size = d_in * d_out
    return _as_blocks(F, d_in, d_out).transpose(1, 0, 3, 2).reshape(size, size)


def partial_traces(F, d_in, d_out):
    """Trace out the outputs, trace out the inputs: (d_in, d_in) and (d_out, d_out).

    `F = A ⊗ B` gives `(tr(B) A, tr(A) B)`. For a Fisher block they are `E[tr(Γ) Λ]` and
    `E[tr(Λ) Γ]`, the numerators of TKFAC's factors.
    """
    blocks = _as_blocks(F, d_in, d_out)
    return np.einsum("iojo->ij", blocks), np.einsum("ioip->op", blocks)


def rearrange(F, d_in, d_out):
    """Van Loan & Pitsianis (1993): R with  F = A ⊗ B  ⇔  R = vec(A) vec(B)ᵀ.

    F and R hold the same numbers in another order, so `‖F − A ⊗ B‖_F = ‖R − vec(A) vec(B)ᵀ‖_F`:
    Kronecker products become rank-one matrices.

    Returns
    -------
    (d_in², d_out²) array.
    """
    return _as_blocks(F, d_in, d_out).transpose(2, 0, 3, 1).reshape(d_in**2, d_out**2)


def unrearrange(R, d_in, d_out):
    """Undo `rearrange`: (d_in², d_out²) -> (d_in·d_out, d_in·d_out)."""
    d_in, d_out = whole_number("d_in", d_in, 1), whole_number("d_out", d_out, 1)
    R = finite_array("R", R, shape=(d_in**2, d_out**2)).reshape(d_in, d_in, d_out, d_out)
    return R.transpose(1, 3, 0, 2).reshape(d_in * d_out, d_in * d_out)


def nearest_kronecker_product(F, d_in, d_out):
    """argmin ‖F − A ⊗ B‖_F: the top singular pair of the rearranged F (Van Loan & Pitsianis 1993).

    Parameters
    ----------
    F : (d_in·d_out, d_in·d_out) array, symmetric positive semi-definite for a Fisher block.

    Returns
    -------
    A : (d_in, d_in) array.  B : (d_out, d_out) array.  Of equal Frobenius norm, with tr(A) >= 0;
    both are positive semi-definite when F is.
    """
    U, s, Vt = np.linalg.svd(rearrange(F, d_in, d_out), full_matrices=False)
    sign = -1.0 if np.trace(unvec(U[:, 0], d_in, d_in)) < 0 else 1.0
    scale = sign * np.sqrt(s[0])
    return unvec(scale * U[:, 0], d_in, d_in), unvec(scale * Vt[0], d_out, d_out)


def kronecker_power_iteration(F, d_in, d_out, steps):
    """Power iteration for the nearest Kronecker product, both sides started from the identity.

    One step is `A₁ ∝ R vec(I)`, `B₁ ∝ Rᵀ vec(I)`: the partial traces of F, TKFAC's factors. Each
    further step is `A_{k+1} ∝ R vec(B_k)`, `B_{k+1} ∝ Rᵀ vec(A_k)`.

    Parameters
    ----------
    F : (d_in·d_out, d_in·d_out) array, symmetric positive semi-definite, not zero.
    steps : whole number >= 1.

    Returns
    -------
    A : (d_in, d_in) array.  B : (d_out, d_out) array of trace one. Their product is scaled to be
    the multiple nearest to F; TKFAC's is the multiple, for steps=1, that keeps the trace.
    """
    steps = whole_number("steps", steps, 1)
    trace = np.trace(finite_array("F", F, square=True))
    if not trace > 0:
        raise ValueError(f"F must have a positive trace; its trace is {trace}")
    R = rearrange(F, d_in, d_out)
    A, B = np.eye(d_in), np.eye(d_out)
    for _ in range(steps):
        A, B = unvec(R @ vec(B), d_in, d_in), unvec(R.T @ vec(A), d_out, d_out)
        A, B = A / np.trace(A), B / np.trace(B)
    scale = (vec(A) @ R @ vec(B)) / (np.sum(A**2) * np.sum(B**2))
    return scale * A, B
