"""What one layer remembers between steps; `LayerCurvature` of `reference/descent.py` in torch.

Running averages of factors, the basis they gave, and eigenvalues in that basis. Which factors, and
whose eigenvalues, is the method's to say (its `estimate_factors` and `corrected`).
"""

import torch

from tekfac_edu.optim.damping import split_damping
from tekfac_edu.optim.eigenbasis import (
    DecompositionFailed,
    eigenbasis,
    first_leading_basis,
    leading_eigenbasis,
    precondition,
    qr_iteration,
)
from tekfac_edu.optim.factors import averaged, factors_from
from tekfac_edu.optim.rescaling import move_eigenvalues

LARGE = 2**18  # numbers in a matrix that does not profit from being multiplied along with others


class LayerCurvature:
    """One layer's running averages, basis and eigenvalues.

    Parameters
    ----------
    corrected : whether eigenvalues are measured, or those of the factors.
    warm_qr : one warm-started QR iteration per refresh instead of `eigh`.
    input_rank : how many of the d_in input directions are kept, if fewer; None: all. With k kept,
        what has one column or number per direction has k + 1: the last is the sum of the rest.

    Attributes
    ----------
    factors : running average, or None.
    Q_in, Q_out : (d_in, d_in) or (d_in, k), and (d_out, d_out) tensors; None before the first
        refresh.
    s_in, s_out : (d_in,) or (k + 1,), and (d_out,) tensors, the factors' eigenvalues scaled so that
        s_out s_inᵀ is D of the uncorrected method; None under a corrected one.
    eigenvalues : (d_out, d_in) or (d_out, k + 1) tensor, D, or None.
    basis_step, scale_step : the step at which basis and D were last refreshed.
    """

    TENSORS = ("Q_in", "Q_out", "s_in", "s_out", "eigenvalues")

    def __init__(self, corrected, warm_qr, input_rank=None):
        self.corrected, self.warm_qr, self.input_rank = corrected, warm_qr, input_rank
        self.factors = self.Q_in = self.Q_out = self.s_in = self.s_out = self.eigenvalues = None
        self.basis_step = self.scale_step = None

    @property
    def ready(self):
        """Whether there is a D to precondition with."""
        return self.eigenvalues is not None

    @property
    def spectrum(self):
        """(d_out, d_in) tensor: D with what is evenly shared written out, in the last columns."""
        return self._written_out(self.eigenvalues)

    @property
    def _left_out(self):
        """How many input directions share the rest."""
        return len(self.Q_in) - self.Q_in.shape[1]

    def _per_direction(self, values):
        """Of what has k + 1 columns, the last as each direction's share of the rest."""
        if not self._left_out:
            return values
        return torch.cat([values[..., :-1], values[..., -1:] / self._left_out], -1)

    def _written_out(self, values):
        values = self._per_direction(values)
        if not self._left_out:
            return values
        rest = values[..., -1:].expand(*values.shape[:-1], self._left_out)
        return torch.cat([values[..., :-1], rest], -1)

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
        s_in, Q_in = self._one_side(S_in, self.Q_in, self._kept(len(S_in)))
        s_out, Q_out = self._one_side(S_out, self.Q_out, len(S_out))
        scale = self.factors.spectrum_scale
        return [Q_in, Q_out] if self.corrected else [Q_in, Q_out, scale * s_in, scale * s_out]

    def _kept(self, d_in):
        """How many input directions the next basis has."""
        return d_in if self.input_rank is None else min(self.input_rank, d_in)

    def _one_side(self, S, old, k):
        """Eigenvalues, None where QR gives none, and k columns of one side's basis."""
        warm = old is not None and old.shape[1] == k
        if not self.warm_qr or not (warm or k < len(S)):
            return eigenbasis(S) if k == len(S) else leading_eigenbasis(S, k)
        Q = qr_iteration(S, old) if warm else first_leading_basis(S, k)
        if not Q.isfinite().all():
            raise DecompositionFailed("a QR iteration gave numbers that are not finite")
        return None, Q

    def identity_basis(self):
        """What to start with if the first `decompose` fails: the identity and its eigenvalues."""
        S_in, S_out = [S.nan_to_num() for S in self.factors.pair]
        k = self._kept(len(S_in))
        Q_in, Q_out = (torch.eye(len(S), dtype=S.dtype, device=S.device) for S in (S_in, S_out))
        if self.corrected:
            return [Q_in[:, :k], Q_out]
        s_in, s_out = S_in.diagonal().clamp(min=0), S_out.diagonal().clamp(min=0)
        if k < len(s_in):
            s_in = torch.cat([s_in[:k], s_in[k:].sum(0, keepdim=True)])
        scale = self.factors.spectrum_scale
        return [Q_in[:, :k], Q_out, scale * s_in, scale * s_out]

    def empty_basis(self):
        """Tensors of the shapes that `decompose` gives, to receive another rank's into."""
        S_in, S_out = self.factors.pair
        k = self._kept(len(S_in))
        bases = [S_in.new_empty(len(S_in), k), torch.empty_like(S_out)]
        if self.corrected:
            return bases
        columns = k + (k < len(S_in))
        return [*bases, S_in.new_empty(columns), torch.empty_like(S_out[0])]

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
        """D + λ, or under "paper" the split of an uncorrected method; of the shape of D."""
        if self.corrected or rule == "added":
            return self._per_direction(self.eigenvalues) + damping
        pi = self.factors.damping_split(self._written_out(self.s_in), self.s_out)
        return split_damping(self._per_direction(self.s_in), self.s_out, pi, damping)

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
    """The damped inverse of each curvature applied to its matrix; small ones alike in one go.

    curvatures : list of LayerCurvature, ready.   matrices : list of (d_out, d_in) tensors.
    dampings : list of λ.   rule : damping rule.   precision : as for `precondition`.
    """
    alike = {}
    for i, M in enumerate(matrices):
        alone = i if M.numel() > LARGE else None
        alike.setdefault((M.shape, M.dtype, curvatures[i].Q_in.shape, alone), []).append(i)
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
