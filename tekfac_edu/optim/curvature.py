"""What one layer remembers between steps; `reference/curvature.py` in torch.

Running averages of factors, the basis they gave, and the eigenvalues in that basis. Which factors,
and whose eigenvalues, is the method's to say.
"""

import math
from typing import NamedTuple

import torch

from tekfac_edu.optim.basis import Basis
from tekfac_edu.optim.eigenbasis import DecompositionFailed, eigenbasis, qr_iteration
from tekfac_edu.optim.eigenvalues import FactorEigenvalues, MeasuredEigenvalues
from tekfac_edu.optim.factors import averaged
from tekfac_edu.optim.truncation import (
    basis_of,
    first_leading_basis,
    leading,
    leading_eigenbasis,
    moved,
)

LARGE = 2**18  # numbers in a matrix that does not profit from being multiplied along with others


class Decomposition(NamedTuple):
    """A new basis, and the eigenvalues that come with it under KFAC and TKFAC; None otherwise."""

    basis: Basis
    eigenvalues: FactorEigenvalues | None

    @property
    def tensors(self):
        """All of them, in a list."""
        return [*self.basis, *(self.eigenvalues or ())]

    @classmethod
    def from_tensors(cls, tensors):
        """What `tensors` gave."""
        Q_in, Q_out, *eigenvalues = tensors
        return cls(basis_of(Q_in, Q_out), FactorEigenvalues(*eigenvalues) if eigenvalues else None)


class LayerCurvature:
    """One layer's running averages, basis and eigenvalues.

    Parameters
    ----------
    layer : Layer.   method : KFAC, EKFAC, TKFAC or TEKFAC.   cost : Cost; it may be exchanged.

    Attributes
    ----------
    factors : running average, or None.
    basis : Basis; None before the first refresh.
    eigenvalues : FactorEigenvalues or MeasuredEigenvalues, or None.
    basis_step, eigenvalues_step : the step at which they were last refreshed.
    """

    def __init__(self, layer, method, cost):
        self.layer, self.method, self.cost = layer, method, cost
        self.factors = self.basis = self.eigenvalues = None
        self.basis_step = self.eigenvalues_step = None

    @property
    def ready(self):
        """Whether there is a D to precondition with."""
        return self.eigenvalues is not None

    @property
    def spectrum(self):
        """(d_out, d_in) tensor: D, undamped."""
        return self.basis.whole(self.eigenvalues.D)

    @property
    def trace(self):
        """() tensor, tr D of the layer."""
        return self.spectrum.sum()

    @property
    def dim(self):
        """Numbers in D."""
        return math.prod(self.layer.shape)

    def average_factors(self, new, decay):
        """decay · old + (1 − decay) · new; the first replaces."""
        self.factors = new if self.factors is None else averaged(self.factors, new, decay)

    def decompose(self):
        """The `Decomposition` of the present factors.

        Raises
        ------
        DecompositionFailed
        """
        sides = S_in, S_out = self.factors.S_in, self.factors.S_out
        old_in, old_out = self.basis or (None, None)
        s_in, Q_in = self._one_side(S_in, old_in, self._kept(S_in))
        s_out, Q_out = self._one_side(S_out, old_out, S_out.shape[-1])
        return self._decomposition(sides, basis_of(Q_in, Q_out), s_in, s_out)

    def identity(self):
        """What to start with if the first `decompose` fails: the identity and its eigenvalues."""
        sides = [S.nan_to_num() for S in (self.factors.S_in, self.factors.S_out)]
        k = self._kept(sides[0])
        Q_in, Q_out = (torch.diag_embed(torch.ones_like(S[..., 0])) for S in sides)
        s_in, s_out = (S.diagonal(dim1=-2, dim2=-1).clamp(min=0) for S in sides)
        basis = basis_of(Q_in[..., -k:].contiguous(), Q_out)
        return self._decomposition(sides, basis, leading(s_in, k), s_out)

    def empty(self):
        """A `Decomposition` of the present shapes, to receive another rank's into."""
        sides = S_in, S_out = self.factors.S_in, self.factors.S_out
        k = self._kept(S_in)
        basis = basis_of(S_in.new_empty(*S_in.shape[:-1], k), torch.empty_like(S_out))
        s_in = S_in.new_empty(*S_in.shape[:-2], basis.shape[-1])
        return self._decomposition(sides, basis, s_in, torch.empty_like(S_out[..., 0]))

    def _decomposition(self, sides, basis, s_in, s_out):
        if self.method.eigenvalues is MeasuredEigenvalues:
            return Decomposition(basis, None)
        root = self.factors.scale.sqrt()
        means = [root * S.diagonal(dim1=-2, dim2=-1).mean(-1) for S in sides]
        rooted = [root[..., None] * s for s in (s_in, s_out)]
        return Decomposition(basis, FactorEigenvalues(*rooted, *means))

    def _kept(self, S_in):
        """How many input directions the next basis has."""
        return min(self.cost.input_rank or S_in.shape[-1], S_in.shape[-1])

    def _one_side(self, S, old, k):
        """Eigenvalues, None where QR gives none, and k columns of one side's basis."""
        whole = k == S.shape[-1]
        warm = old is not None and old.shape[-1] == k
        if self.cost.eigenbasis == "eigh" or (whole and not warm):
            return eigenbasis(S) if whole else leading_eigenbasis(S, k)
        Q = qr_iteration(S, old) if warm else first_leading_basis(S, k)
        if not Q.isfinite().all():
            raise DecompositionFailed("a QR iteration gave numbers that are not finite")
        return None, Q

    def turn_to(self, decomposition, step):
        """Take over a new basis; eigenvalues that were measured in the old one move along."""
        basis, eigenvalues = decomposition
        if eigenvalues is not None:
            self.eigenvalues, self.eigenvalues_step = eigenvalues, step
        elif self.eigenvalues is not None:
            D = moved(self.eigenvalues.D, self.basis, basis)
            self.eigenvalues = MeasuredEigenvalues(D)
        self.basis, self.basis_step = basis, step

    def average_eigenvalues(self, new, decay, step):
        """Average in D of a batch, measured in the present basis; the first replaces."""
        if self.eigenvalues is not None:
            new = decay * self.eigenvalues.D + (1 - decay) * new
        self.eigenvalues, self.eigenvalues_step = MeasuredEigenvalues(new), step

    def no_factors(self):
        """The factors of no examples: zeros of the right shapes."""
        options = {"dtype": self.layer.dtype, "device": self.layer.weight.device}
        *blocks, d_out, d_in = self.layer.shape
        a, g = torch.zeros(*blocks, 1, d_in, **options), torch.zeros(*blocks, 1, d_out, **options)
        return self.layer.each_block(self.method.factors)(a, g)

    def no_eigenvalues(self):
        """Those measured on no examples: zeros of the right shape."""
        return MeasuredEigenvalues(self.basis.Q_in.new_zeros(self.basis.shape))

    def state_dict(self):
        """Everything, as tensors and whole numbers."""
        named = {name: getattr(self, name) for name in ("factors", "basis", "eigenvalues")}
        state = {name: value and value._asdict() for name, value in named.items()}
        return state | {"basis_step": self.basis_step, "eigenvalues_step": self.eigenvalues_step}

    def load_state_dict(self, state):
        """Take over what `state_dict` gave."""
        device = self.layer.weight.device

        def loaded(name, kind):
            found = state[name]
            return found and kind(**{k: t.clone().to(device) for k, t in found.items()})

        self.factors = loaded("factors", type(self.no_factors()))
        self.basis = loaded("basis", basis_of)
        self.eigenvalues = loaded("eigenvalues", self.method.eigenvalues)
        self.basis_step, self.eigenvalues_step = state["basis_step"], state["eigenvalues_step"]


def preconditioned(curvatures, matrices, dampings, settings):
    """The damped inverse of each layer's curvature applied to its matrix; small ones in one go.

    curvatures : {Layer: LayerCurvature}; one that is not ready gives zeros.
    matrices : {Layer: (d_out, d_in) tensor}.   dampings : {Layer: λ}.
    settings : Settings, for the rule of damping and the precision.
    """
    directions = {layer: torch.zeros_like(M) for layer, M in matrices.items()}
    shapes = {}
    for layer, M in matrices.items():
        if curvatures[layer].ready:
            alone = layer if M.numel() > LARGE else None
            key = M.shape, M.dtype, curvatures[layer].basis.Q_in.shape, alone
            shapes.setdefault(key, []).append(layer)
    for layers in shapes.values():
        alike = [curvatures[layer] for layer in layers]
        bases = [curvature.basis for curvature in alike]
        D = [
            settings.damping.damped(curvature.method, curvature.eigenvalues, dampings[layer])
            for layer, curvature in zip(layers, alike, strict=True)
        ]
        stacks = [matrices[layer] for layer in layers], *zip(*bases, strict=True), D
        found = bases[0].precondition(*map(_stacked, stacks), settings.cost.precision)
        directions |= zip(layers, found, strict=True)
    return directions


def _stacked(matrices):
    return matrices[0][None] if len(matrices) == 1 else torch.stack(list(matrices))
