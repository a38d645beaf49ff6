"""The Fisher matrix itself: one layer's block, and a whole small network's.

    F = E_n[ Σ_s vec(G_sn) vec(G_sn)ᵀ ]          G_sn = Σ_t g_snt ā_ntᵀ

`vec` stacks columns; for one vector and one position per example this is E[Λ ⊗ Γ]. Which Fisher it
is (exact, sampled, empirical) is decided by the vectors g alone. Beside chapter 2; everything later
is measured against these matrices, so nothing here approximates.
"""

import numpy as np

from tekfac_edu.reference.inputs import layer_inputs


def _gradient_vectors(a, g):
    """vec(G_sn) of every vector and example: (S, N, d_in · d_out)."""
    a, g = layer_inputs(a, g)
    S, N = g.shape[:2]
    return np.einsum("nti,snto->snio", a, g, optimize=True).reshape(S, N, -1)


def fisher_block(a, g):
    """The Fisher block of one layer, formed.

    Parameters
    ----------
    a : (N, d_in) array, or (N, T, d_in) with T positions per example, which add up.
    g : same leading axes, or one more in front for S vectors per example; then d_out.
        Gradients of each example's own loss (N times what the mean loss hands back).

    Returns
    -------
    (d_in·d_out, d_in·d_out) array, symmetric positive semi-definite.
    """
    vectors = _gradient_vectors(a, g)
    return np.einsum("snp,snq->pq", vectors, vectors, optimize=True) / vectors.shape[1]


def fisher_matrix(statistics):
    """The Fisher of a whole network, the blocks between layers included.

    Parameters
    ----------
    statistics : list of LayerStatistics, from a network's `layer_statistics`; its `fisher` decides
        which.

    Returns
    -------
    (P, P) array, P the number of parameters, in the order of `stack_vecs(mlp.weights)`.
    """
    if not statistics:
        raise ValueError("statistics must hold at least one layer; got none")
    of_layers = [_gradient_vectors(layer.a, layer.g) for layer in statistics]
    counts = [vectors.shape[:2] for vectors in of_layers]
    if len(set(counts)) > 1:
        raise ValueError(
            f"statistics must come from one batch; (vectors per example, examples) differ: {counts}"
        )
    vectors = np.concatenate(of_layers, axis=2)
    return np.einsum("snp,snq->pq", vectors, vectors, optimize=True) / vectors.shape[1]


def exact_fisher(mlp, x, loss="cross_entropy"):
    """The exact Fisher of a small network: all layers, and the blocks between them.

    Parameters
    ----------
    mlp : MLP or ConvNet.   x : its inputs, N of them.
    loss : "cross_entropy", or "squared_error" (a Gaussian of unit variance). For both it equals
        the generalized Gauss-Newton matrix.

    Returns
    -------
    (P, P) array, P the number of parameters, in the order of `stack_vecs(mlp.weights)`.
    """
    return fisher_matrix(mlp.layer_statistics(x, fisher="exact", loss=loss))
