"""The methods in NumPy and float64, dense matrices allowed, written to be read.

Nothing here imports torch. Every method is a function of two matrices per layer, the inputs
`a: (N, d_in)` and the output gradients `g: (N, d_out)`, and the four methods are a 2 × 2 table:

                                eigenvalues as the factors give them    eigenvalues corrected
    factors of independence     KFAC                                    EKFAC
    trace-restricted factors    TKFAC                                   TEKFAC
"""

from tekfac_edu.reference.convolution import ConvNet, patches
from tekfac_edu.reference.damping import kfac_damping, kfac_pi, trace_damping
from tekfac_edu.reference.descent import GradientDescent, LayerCurvature, NaturalGradient, train
from tekfac_edu.reference.eigenbasis import eigenbasis, qr_iteration
from tekfac_edu.reference.ekfac import EKFAC
from tekfac_edu.reference.factors import (
    KFACFactors,
    TraceRestrictedFactors,
    kfac_factors,
    trace_restricted_factors,
)
from tekfac_edu.reference.fisher import exact_fisher, fisher_block, fisher_matrix
from tekfac_edu.reference.kfac import KFAC
from tekfac_edu.reference.kronecker import (
    kron_apply,
    kronecker_power_iteration,
    nearest_kronecker_product,
    partial_traces,
    rearrange,
    split_vecs,
    stack_vecs,
    to_row_order,
    unrearrange,
    unvec,
    vec,
)
from tekfac_edu.reference.networks import MLP, LayerStatistics
from tekfac_edu.reference.rescaling import corrected_eigenvalues, move_eigenvalues
from tekfac_edu.reference.tekfac import TEKFAC
from tekfac_edu.reference.tkfac import TKFAC

__all__ = [
    "EKFAC",
    "KFAC",
    "MLP",
    "TEKFAC",
    "TKFAC",
    "ConvNet",
    "GradientDescent",
    "KFACFactors",
    "LayerCurvature",
    "LayerStatistics",
    "NaturalGradient",
    "TraceRestrictedFactors",
    "corrected_eigenvalues",
    "eigenbasis",
    "exact_fisher",
    "fisher_block",
    "fisher_matrix",
    "kfac_damping",
    "kfac_factors",
    "kfac_pi",
    "kron_apply",
    "kronecker_power_iteration",
    "move_eigenvalues",
    "nearest_kronecker_product",
    "partial_traces",
    "patches",
    "qr_iteration",
    "rearrange",
    "split_vecs",
    "stack_vecs",
    "to_row_order",
    "trace_damping",
    "trace_restricted_factors",
    "train",
    "unrearrange",
    "unvec",
    "vec",
]
