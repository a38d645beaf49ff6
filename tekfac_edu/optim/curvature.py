"""What one layer remembers between steps; `LayerCurvature` of `reference/descent.py` in torch.

Running averages of factors, the basis they gave, and eigenvalues in that basis. Which factors, and
whose eigenvalues, is the method's to say (its `estimate_factors` and `corrected`).
"""

import torch

from tekfac_edu.optim.damping import split_damping
from tekfac_edu.optim.eigenbasis import (
    DecompositionFailed,
    eigenbasis,
    precondition,
    qr_iteration,
)
from tekfac_edu.optim.factors import averaged, factors_from
from tekfac_edu.optim.rescaling import move_eigenvalues


class LayerCurvature:
    """One layer's running averages, basis and eigenvalues.

    Parameters
    ----------
    corrected : whether eigenvalues are measured, or those of the factors.
    warm_qr : one warm-started QR iteration per refresh instead of `eigh`.

    Attributes
    ----------
    factors : running average, or None.
    Q_in, Q_out : (d_in, d_in) and (d_out, d_out) tensors, or None before the first refresh.
    s_in, s_out : (d_in,) and (d_out,) tensors, the factors' eigenvalues scaled so that
        s_out s_inᵀ is D of the uncorrected method; None under a corrected one.
    eigenvalues : (d_out, d_in) tensor, D, or None.
    basis_step, scale_step : the step at which basis and D were last refreshed.
    """

    TENSORS = ("Q_in", "Q_out", "s_in", "s_out", "eigenvalues")

    def __init__(self, corrected, warm_qr):
        self.corrected, self.warm_qr = corrected, warm_qr
        self.factors = self.Q_in = self.Q_out = self.s_in = self.s_out = self.eigenvalues = None
        self.basis_step = self.scale_step = None

    @property
    def ready(self):
        """Whether there is a D to precondition with."""
        return self.eigenvalues is not None

    def average_factors(self, new, decay):
        """decay · old + (1 − decay) · new; the first replaces."""
        if self.factors is not None:
            new = averaged(self.factors, new, decay)
        self.factors = new

    def decompose(self):
        """The basis of the present factors, [Q_in, Q_out], and their eigenvalues unless corrected.

        Raises
        ------
        DecompositionFailed
        """
        S_in, S_out = self.factors.pair
        if self.warm_qr and self.Q_in is not None:
            basis = [qr_iteration(S_in, self.Q_in), qr_iteration(S_out, self.Q_out)]
            if not all(Q.isfinite().all() for Q in basis):
                raise DecompositionFailed("a QR iteration gave numbers that are not finite")
            return basis
        (s_in, Q_in), (s_out, Q_out) = eigenbasis(S_in), eigenbasis(S_out)
        scale = self.factors.spectrum_scale
        return [Q_in, Q_out] if self.corrected else [Q_in, Q_out, scale * s_in, scale * s_out]

    def identity_basis(self):
        """What to start with if the first `decompose` fails: the identity and its eigenvalues."""
        pair = [S.nan_to_num() for S in self.factors.pair]
        identities = [torch.eye(len(S), dtype=S.dtype, device=S.device) for S in pair]
        if self.corrected:
            return identities
        return identities + [self.factors.spectrum_scale * S.diagonal().clamp(min=0) for S in pair]

    def empty_basis(self):
        """Tensors of the shapes that `decompose` gives, to receive another rank's into."""
        pair = self.factors.pair
        squares = [torch.empty_like(S) for S in pair]
        return squares if self.corrected else squares + [torch.empty_like(S[0]) for S in pair]

    def turn_to(self, basis, step):
        """Take over what `decompose` gave; a corrected method's eigenvalues move along."""
        if self.corrected:
            if self.eigenvalues is not None:
                self.eigenvalues = move_eigenvalues(self.eigenvalues, self.Q_in, self.Q_out, *basis)
            self.Q_in, self.Q_out = basis
        else:
            self.Q_in, self.Q_out, self.s_in, self.s_out = basis
            self.eigenvalues = torch.outer(self.s_out, self.s_in)
            self.scale_step = step
        self.basis_step = step

    def average_eigenvalues(self, new, decay, step):
        """Average in D of a batch, measured in the present basis; the first replaces."""
        if self.eigenvalues is not None:
            new = decay * self.eigenvalues + (1 - decay) * new
        self.eigenvalues, self.scale_step = new, step

    def damped_eigenvalues(self, damping, rule):
        """D + λ, or under "paper" the split of an uncorrected method: (d_out, d_in)."""
        if self.corrected or rule == "added":
            return self.eigenvalues + damping
        pi = self.factors.damping_split(self.s_in, self.s_out)
        return split_damping(self.s_in, self.s_out, pi, damping)

    def state_dict(self):
        """Everything, as tensors and whole numbers."""
        state = {name: getattr(self, name) for name in self.TENSORS}
        state |= {"basis_step": self.basis_step, "scale_step": self.scale_step, "factors": None}
        if self.factors is not None:
            state["factors"] = dict(vars(self.factors))
        return state

    def load_state_dict(self, state, device):
        """Take over what `state_dict` gave."""
        for name in self.TENSORS:
            setattr(self, name, None if state[name] is None else state[name].clone().to(device))
        self.basis_step, self.scale_step = state["basis_step"], state["scale_step"]
        self.factors = state["factors"]
        if self.factors is not None:
            tensors = {name: t.clone().to(device) for name, t in self.factors.items()}
            self.factors = factors_from(tensors)


def preconditioned(curvatures, matrices, dampings, rule, precision="full"):
    """The damped inverse of each curvature applied to its matrix; those of one shape in one go.

    curvatures : list of LayerCurvature, ready.   matrices : list of (d_out, d_in) tensors.
    dampings : list of λ.   rule : damping rule.   precision : as for `precondition`.
    """
    alike = {}
    for i, M in enumerate(matrices):
        alike.setdefault((M.shape, M.dtype), []).append(i)
    results = [None] * len(matrices)
    for members in alike.values():
        some = [curvatures[i] for i in members]
        D = [curvatures[i].damped_eigenvalues(dampings[i], rule) for i in members]
        stacks = (
            [matrices[i] for i in members],
            [curvature.Q_in for curvature in some],
            [curvature.Q_out for curvature in some],
            D,
        )
        found = precondition(*map(_stacked, stacks), precision)
        for i, result in zip(members, found, strict=True):
            results[i] = result
    return results


def _stacked(matrices):
    return matrices[0][None] if len(matrices) == 1 else torch.stack(matrices)
