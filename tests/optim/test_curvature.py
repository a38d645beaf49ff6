"""If this fails, a layer remembers something else than the averages of what it saw."""

import numpy as np
import pytest
import torch
from torch import nn

from tekfac_edu.optim import EKFAC, TEKFAC, Cost
from tekfac_edu.optim.basis import Basis
from tekfac_edu.optim.curvature import Decomposition, LayerCurvature
from tekfac_edu.optim.eigenbasis import DecompositionFailed, eigenbasis, qr_iteration
from tekfac_edu.optim.eigenvalues import FactorEigenvalues, MeasuredEigenvalues, move_eigenvalues
from tekfac_edu.optim.layers import factored_layer
from tekfac_edu.optim.truncation import leading_eigenbasis, moved

from .networks import gaussian
from .one_step import CORRECTED, corrected, every_basis
from .oracles import assert_close
from .scenarios.resuming import through_a_file
from .training import assert_same_bits, every_method

LAYERS = {
    "whole": lambda: nn.Linear(4, 3),
    "groups": lambda: nn.Conv1d(4, 6, 2, groups=2),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)
every_rank = pytest.mark.parametrize("input_rank", [None, 2])


def curvature_of(method, kind="whole", dtype=torch.float64, **cost):
    layer = factored_layer("name", LAYERS[kind]().to(dtype), True)
    return LayerCurvature(layer, method, Cost(**cost))


def factors_of(curvature, seed=0):
    """Of a batch of 20 examples; of full rank."""
    *blocks, d_out, d_in = curvature.layer.shape
    a, g = gaussian(*blocks, 20, d_in, seed=seed), gaussian(*blocks, 20, d_out, seed=seed + 1)
    a = a * torch.arange(1, d_in + 1)
    formula = curvature.layer.each_block(curvature.method.factors)
    return formula(a.to(curvature.layer.dtype), g.to(curvature.layer.dtype))


def after_a_refresh(*args, **options):
    curvature = curvature_of(*args, **options)
    curvature.average_factors(factors_of(curvature), 0.9)
    curvature.turn_to(curvature.decompose(), 3)
    if curvature.method in CORRECTED:
        curvature.average_eigenvalues(gaussian(*curvature.basis.shape).square(), 0.9, 4)
    return curvature


@every_layer
@every_method
def test_factors_are_averaged_and_the_first_replaces(method, kind):
    curvature = curvature_of(method, kind)
    assert not curvature.ready
    first, other = factors_of(curvature), factors_of(curvature, seed=7)
    curvature.average_factors(first, 0.9)
    assert all(map(torch.equal, curvature.factors, first))
    curvature.average_factors(other, 0.9)
    for found, x, y in zip(curvature.factors, first, other, strict=True):
        assert_close(found, 0.9 * x + 0.1 * y, rtol=1e-14)
    assert not curvature.ready


@every_layer
@every_rank
@every_method
def test_by_eigh_it_has_the_eigenvectors_of_its_factors(method, kind, input_rank):
    curvature = after_a_refresh(method, kind, input_rank=input_rank)
    S_in, S_out = curvature.factors.S_in, curvature.factors.S_out
    s_in, Q_in = leading_eigenbasis(S_in, 2) if input_rank else eigenbasis(S_in)
    s_out, Q_out = eigenbasis(S_out)
    assert torch.equal(curvature.basis.Q_in, Q_in)
    assert torch.equal(curvature.basis.Q_out, Q_out)
    assert curvature.basis_step == 3
    if method in CORRECTED:
        assert curvature.eigenvalues_step == 4
        return
    assert curvature.eigenvalues_step == 3
    found, root = curvature.eigenvalues, curvature.factors.scale.sqrt()[..., None]
    assert_close(found.s_in, root * s_in, rtol=1e-14)
    assert_close(found.s_out, root * s_out, rtol=1e-14)
    assert_close(found.mean_in, (root * s_in_whole(S_in)).mean(-1), rtol=1e-12)
    assert_close(found.mean_out, (root * s_out).mean(-1), rtol=1e-12)


def s_in_whole(S_in):
    return torch.linalg.eigvalsh(S_in)


@every_layer
@every_rank
@corrected
def test_by_qr_a_new_basis_is_one_iteration_from_the_last_one(method, kind, input_rank):
    curvature = after_a_refresh(method, kind, input_rank=input_rank, eigenbasis="qr")
    old = curvature.basis
    curvature.average_factors(factors_of(curvature, seed=7), 0.5)
    new = curvature.decompose().basis
    assert torch.equal(new.Q_in, qr_iteration(curvature.factors.S_in, old.Q_in))
    assert torch.equal(new.Q_out, qr_iteration(curvature.factors.S_out, old.Q_out))


@corrected
def test_a_whole_first_basis_is_by_eigh_and_so_is_one_of_another_width(method):
    """One iteration from another width would start from nothing."""
    curvature = after_a_refresh(method, eigenbasis="qr")
    assert torch.equal(curvature.basis.Q_in, eigenbasis(curvature.factors.S_in)[1])
    curvature.cost = Cost(eigenbasis="qr", input_rank=2)
    curvature.turn_to(curvature.decompose(), 5)
    assert curvature.basis.Q_in.shape == (5, 2)
    curvature.cost = Cost(eigenbasis="qr")
    curvature.turn_to(curvature.decompose(), 6)
    assert torch.equal(curvature.basis.Q_in, eigenbasis(curvature.factors.S_in)[1])


@every_layer
@every_rank
@corrected
def test_measured_eigenvalues_move_with_the_basis_and_are_averaged(method, kind, input_rank):
    curvature = after_a_refresh(method, kind, input_rank=input_rank)
    old, D = curvature.basis, curvature.eigenvalues.D
    curvature.average_factors(factors_of(curvature, seed=7), 0.0)
    curvature.turn_to(curvature.decompose(), 5)
    expected = moved(D, old, curvature.basis)
    assert torch.equal(curvature.eigenvalues.D, expected)
    if not input_rank:
        assert_close(expected, move_eigenvalues(D, *old, *curvature.basis), rtol=1e-14)
    assert (curvature.basis_step, curvature.eigenvalues_step) == (5, 4)
    new = torch.ones(curvature.basis.shape, dtype=torch.float64)
    curvature.average_eigenvalues(new, 0.9, 6)
    assert_close(curvature.eigenvalues.D, 0.9 * expected + 0.1, rtol=1e-14)
    assert curvature.eigenvalues_step == 6


@every_layer
@every_rank
@every_method
def test_trace_and_dim_are_of_the_whole_layer(method, kind, input_rank):
    curvature = after_a_refresh(method, kind, input_rank=input_rank)
    assert curvature.spectrum.shape == curvature.layer.shape
    assert curvature.dim == np.prod(curvature.layer.shape)
    assert_close(curvature.trace, curvature.spectrum.sum().item(), rtol=1e-14)
    if method not in CORRECTED:
        S_in, S_out, scale = (getattr(curvature.factors, n) for n in ("S_in", "S_out", "scale"))
        traces = (S.diagonal(dim1=-2, dim2=-1).sum(-1) for S in (S_in, S_out))
        assert_close(curvature.trace, (scale * next(traces) * next(traces)).sum().item())


@every_layer
@every_rank
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_basis
def test_what_is_made_to_be_received_into_is_of_the_shapes_of_what_is_sent(
    method, eigenbasis, kind, input_rank, dtype
):
    cost = {"input_rank": input_rank, "eigenbasis": eigenbasis}
    curvature = curvature_of(method, kind, dtype, **cost)
    curvature.average_factors(factors_of(curvature), 0.9)
    sent, empty, identity = curvature.decompose(), curvature.empty(), curvature.identity()
    for other in (empty, identity):
        assert [t.shape for t in other.tensors] == [t.shape for t in sent.tensors]
        assert {t.dtype for t in other.tensors} == {dtype}
        assert type(other.basis) is type(sent.basis)
    received = Decomposition.from_tensors(sent.tensors)
    assert type(received.basis) is type(sent.basis)
    assert type(received.eigenvalues) is type(sent.eigenvalues)
    assert all(map(torch.equal, received.tensors, sent.tensors))


@every_layer
@every_rank
@every_method
def test_zeros_of_no_examples_have_the_shapes_of_those_of_some(method, kind, input_rank):
    curvature = after_a_refresh(method, kind, input_rank=input_rank)
    nothing, something = curvature.no_factors(), factors_of(curvature)
    assert type(nothing) is type(something)
    pairs = [*zip(nothing, something, strict=True)]
    pairs += [(curvature.no_eigenvalues().D, curvature.eigenvalues.D)]
    for zeros, found in pairs:
        assert not zeros.any()
        assert (zeros.shape, zeros.dtype) == (found.shape, found.dtype)


@every_layer
@every_rank
@every_method
def test_a_state_gives_the_same_back_through_a_file(method, kind, input_rank):
    curvature = after_a_refresh(method, kind, input_rank=input_rank)
    other = curvature_of(method, kind)
    other.load_state_dict(through_a_file(curvature.state_dict()))
    assert_same_bits(other.state_dict(), curvature.state_dict())
    for name in ("factors", "basis", "eigenvalues"):
        assert type(getattr(other, name)) is type(getattr(curvature, name))
    assert (other.basis_step, other.eigenvalues_step) == (3, 3 + (method in CORRECTED))


@every_method
def test_a_state_of_before_the_first_step_is_loaded_too(method):
    curvature, other = curvature_of(method), after_a_refresh(method)
    other.load_state_dict(through_a_file(curvature.state_dict()))
    assert not other.ready
    assert other.factors is other.basis is other.basis_step is None


@every_method
def test_a_loaded_state_is_a_copy(method):
    state = after_a_refresh(method).state_dict()
    other = curvature_of(method)
    other.load_state_dict(state)
    before = other.factors[0].clone()
    state["factors"][other.factors._fields[0]].zero_()
    assert torch.equal(other.factors[0], before)


@every_layer
@every_rank
@every_basis
def test_factors_that_are_not_finite_are_a_failed_decomposition(
    method, eigenbasis, kind, input_rank
):
    """The identity is still to be had, with eigenvalues of what is finite."""
    curvature = after_a_refresh(method, kind, input_rank=input_rank, eigenbasis=eigenbasis)
    bad = curvature.factors._replace(
        **{curvature.factors._fields[-2]: torch.full_like(curvature.factors[-2], torch.nan)}
    )
    curvature.factors = bad
    with pytest.raises(DecompositionFailed):
        curvature.decompose()
    assert all(t.isfinite().all() for t in curvature.identity().basis)


def test_a_basis_and_eigenvalues_are_plain_tuples():
    """States and messages hold them field by field."""
    curvature = after_a_refresh(EKFAC)
    assert type(curvature.basis) is Basis and len(curvature.basis) == 2
    assert MeasuredEigenvalues._fields == ("D",)
    assert FactorEigenvalues._fields == ("s_in", "s_out", "mean_in", "mean_out")
    assert set(curvature.state_dict()) == {
        *("factors", "basis", "eigenvalues", "basis_step", "eigenvalues_step"),
    }
    assert TEKFAC.eigenvalues is MeasuredEigenvalues
