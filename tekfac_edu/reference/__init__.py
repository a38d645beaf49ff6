"""The methods in NumPy and float64, dense matrices allowed, written to be read.

Nothing here imports torch. Every method is a function of two matrices per layer, the inputs
`a: (N, d_in)` and the output gradients `g: (N, d_out)`, and the four methods are a 2 × 2 table:

                                eigenvalues as the factors give them    eigenvalues measured
    factors of independence     KFAC                                    EKFAC
    trace-restricted factors    TKFAC                                   TEKFAC

What is named here checks its arguments. A function whose name begins with an underscore is the
formula behind a check, for arrays that have been checked already or were made here.
"""

from tekfac_edu.reference.convolution import ConvNet, patches
from tekfac_edu.reference.curvature import LayerCurvature
from tekfac_edu.reference.damping import Added, ByTrace, Paper, kfac_damping, kfac_pi
from tekfac_edu.reference.descent import GradientDescent, NaturalGradient, train
from tekfac_edu.reference.eigenbasis import eigenbasis, precondition, qr_iteration
from tekfac_edu.reference.eigenvalues import corrected_eigenvalues, move_eigenvalues
from tekfac_edu.reference.ekfac import EKFAC
from tekfac_edu.reference.factors import (
    KFACFactors,
    TraceRestrictedFactors,
    averaged,
    kfac_factors,
    summed_factors,
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
from tekfac_edu.reference.tekfac import TEKFAC
from tekfac_edu.reference.tkfac import TKFAC

__all__ = [
    "EKFAC",
    "KFAC",
    "MLP",
    "TEKFAC",
    "TKFAC",
    "Added",
    "ByTrace",
    "ConvNet",
    "GradientDescent",
    "KFACFactors",
    "LayerCurvature",
    "LayerStatistics",
    "NaturalGradient",
    "Paper",
    "TraceRestrictedFactors",
    "averaged",
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
    "precondition",
    "qr_iteration",
    "rearrange",
    "split_vecs",
    "stack_vecs",
    "summed_factors",
    "to_row_order",
    "trace_restricted_factors",
    "train",
    "unrearrange",
    "unvec",
    "vec",
]
