"""What each layer's preconditioner does: to a matrix; as a table, which shows a layer running SGD.

A preconditioner can be wrong in scale and nobody notices: damping swamps the spectrum, the
direction is the gradient, the loss still falls. The columns to look at are `swamped`, the share of
the eigenvalues below the damping, and `cosine`, between the direction and the gradient.
"""

from dataclasses import dataclass

import torch
from tabulate import tabulate

from tekfac_edu.optim.curvature import preconditioned
from tekfac_edu.optim.groups import SETTINGS
from tekfac_edu.optim.refusals import refuse_module

RUNS_SGD = 0.9999  # cosine above which a direction is the gradient for all practical purposes


@dataclass(frozen=True)
class LayerReport:
    """One module's line.

    Attributes
    ----------
    name, treatment : as in `repr(optimizer)`. The rest is None unless the module is factored and
        has taken a step.
    d_out, d_in : sizes, the bias counted in d_in.
    damping : λ of the layer.   smallest, median, largest : of the eigenvalues D, undamped.
    swamped : share of D below the damping, 0 to 1.
    cosine : between preconditioned direction and gradient; None without a `.grad`.
    basis_age, eigenvalues_age : steps since the basis and D were refreshed; 0 if by the last step.
    warning : "" or what is wrong.
    """

    name: str
    treatment: str
    d_out: int | None = None
    d_in: int | None = None
    damping: float | None = None
    smallest: float | None = None
    median: float | None = None
    largest: float | None = None
    swamped: float | None = None
    cosine: float | None = None
    basis_age: int | None = None
    eigenvalues_age: int | None = None
    warning: str = ""


@dataclass(frozen=True)
class Report:
    """Lines for every module with parameters; `print(report)` shows them as a table.

    Attributes
    ----------
    rows : tuple of LayerReport.
    acted, steps : in how many of how many last steps the trust region shortened the step; of as
        many as the longest interval has. (0, 0) without one.
    """

    rows: tuple
    acted: int = 0
    steps: int = 0

    def __str__(self):
        headers = [
            "module",
            "treatment",
            "d_out × d_in",
            "damping",
            "smallest D",
            "median D",
            "largest D",
            "swamped",
            "cosine",
            "basis age",
            "eigenvalues age",
        ]
        table = [
            [
                row.name,
                row.treatment,
                row.d_out and f"{row.d_out} × {row.d_in}",
                *(_short(x) for x in (row.damping, row.smallest, row.median, row.largest)),
                None if row.swamped is None else f"{row.swamped:.0%}",
                None if row.cosine is None else f"{row.cosine:.4f}",
                row.basis_age,
                row.eigenvalues_age,
            ]
            for row in self.rows
        ]
        lines = [tabulate(table, headers, disable_numparse=True, missingval="")]
        lines += [f"{row.name}: {row.warning}" for row in self.rows if row.warning]
        if self.steps:
            lines.append(f"trust region acted in {self.acted} of the last {self.steps} steps")
        return "\n".join(lines)


def _short(x):
    return None if x is None else f"{x:.1e}"


@torch.no_grad()
def precondition(optimizer, module, M):
    """The damped preconditioner of one layer applied to any M: for study and tests.

    Parameters
    ----------
    module : a factored module of the model.
    M : (d_out, d_in) tensor; the bias, if there is one, is the last column. Of a convolution in B
        groups (B, d_out, d_in).

    Returns
    -------
    Tensor of M's shape, in the dtype of the statistics. Never multiplied by the damping.

    Raises
    ------
    ValueError, RuntimeError
        If the module is not factored, or M has another shape; before the first step.
    """
    layer = refuse_module(optimizer, module, M)
    curvatures, dampings = optimizer.curvatures, optimizer.dampings()
    with torch.autocast(M.device.type, enabled=False):
        M = M.to(layer.dtype)
        return preconditioned(curvatures, {layer: M}, dampings, optimizer.settings)[layer]


@torch.no_grad()
def report(optimizer):
    """The `Report` of an optimizer, from its present curvature and the present `.grad`."""
    dampings = optimizer.dampings()
    layers = {layer.name: layer for layer in optimizer.layers}
    rows = []
    for name, treatment in optimizer.treatments.items():
        layer = layers.get(name)
        if layer is None or not optimizer.curvatures[layer].ready:
            sizes = (None, None) if layer is None else (layer.d_out, layer.d_in)
            rows.append(LayerReport(name, treatment, *sizes))
        else:
            rows.append(_row(optimizer, layer, treatment, float(dampings[layer])))
    acted = sum(float(nu) < 1 for nu in optimizer.shrunk)
    return Report(tuple(rows), acted, len(optimizer.shrunk))


def _row(optimizer, layer, treatment, damping):
    curvature = optimizer.curvatures[layer]
    D = curvature.spectrum
    cosine = None
    if layer.weight.grad is not None:
        M = layer.gradient()
        direction = optimizer.precondition(layer.module, M)
        cosine = torch.nn.functional.cosine_similarity(direction.flatten(), M.flatten(), 0).item()
    warning = ""
    if cosine is not None and cosine > RUNS_SGD:
        warning = (
            f"direction and gradient agree to cosine {cosine:.6f}: this layer runs SGD. Its "
            f"largest eigenvalue is {D.max():.1e} and its damping {damping:.1e}"
        )
    return LayerReport(
        layer.name,
        treatment,
        layer.d_out,
        layer.d_in,
        damping,
        D.min().item(),
        D.median().item(),
        D.max().item(),
        (D < damping).float().mean().item(),
        cosine,
        optimizer.steps - 1 - curvature.basis_step,
        optimizer.steps - 1 - curvature.eigenvalues_step,
        warning,
    )


def summary(optimizer):
    """Settings, groups, and how every module is treated: what `print(optimizer)` shows."""
    lines = [f"{type(optimizer).__name__}({optimizer.settings})"]
    for i, group in enumerate(optimizer.param_groups):
        values = ", ".join(f"{name}={group[name]:g}" for name in SETTINGS)
        lines.append(f"  group {i}: {len(group['params'])} tensors, {values}")
    lines += [f"  {name or 'the model'}: {text}" for name, text in optimizer.treatments.items()]
    return "\n".join(lines)
