"""If this fails, a layer takes a step by the curvature or the damping of another."""

import numpy as np
import pytest
import torch
from torch import nn

from tekfac_edu.optim.curvature import LayerCurvature, preconditioned
from tekfac_edu.optim.factors import kfac_factors, trace_restricted_factors

from .networks import CLASSES, batches, double_precision
from .oracles import assert_close
from .training import EVERY_STEP, backward, every_method, train

ESTIMATES = {
    "KFAC": (kfac_factors, False),
    "EKFAC": (kfac_factors, True),
    "TKFAC": (trace_restricted_factors, False),
    "TEKFAC": (trace_restricted_factors, True),
}
every_rule = pytest.mark.parametrize("rule", ["paper", "added"])
every_kind = pytest.mark.parametrize("kind", ESTIMATES)
# Three of one shape, two of another, one by itself, and the transposed shape.
SHAPES = [(3, 5), (4, 4), (3, 5), (5, 3), (4, 4), (2, 7), (3, 5)]
DAMPINGS = [0.5, 0.01, 2.0, 0.1, 3.0, 1e-4, 0.02]


def curvature_of(kind, d_out, d_in, seed, dtype=torch.float64):
    """As after one step with uneven examples."""
    estimate, corrected = ESTIMATES[kind]
    draw = torch.Generator().manual_seed(seed)
    size = torch.rand(20, 1, generator=draw, dtype=torch.float64) + 0.1 * seed + 0.1
    a, g = (
        (size * torch.randn(20, d, generator=draw, dtype=torch.float64)).to(dtype)
        for d in (d_in, d_out)
    )
    curvature = LayerCurvature(corrected, warm_qr=False)
    curvature.average_factors(estimate(a, g), 0.95)
    curvature.turn_to(curvature.decompose(), 0)
    if corrected:
        D = torch.rand(d_out, d_in, generator=draw, dtype=torch.float64).to(dtype)
        curvature.average_eigenvalues(D, 0.95, 0)
    return curvature


def direction_by_kronecker(kind, curvature, M, damping, rule):
    """(F̂ + damping)⁻¹ vec M, the matrix written out and solved with, in float64 NumPy."""
    S_in, S_out = (S.double().numpy() for S in curvature.factors.pair)
    M, d_out, d_in = M.double().numpy(), len(S_out), len(S_in)
    if ESTIMATES[kind][1]:
        Q = np.kron(curvature.Q_in.double().numpy(), curvature.Q_out.double().numpy())
        F = (Q * curvature.eigenvalues.double().numpy().flatten(order="F")) @ Q.T
    elif rule == "added":
        scale = float(curvature.factors.delta) if kind == "TKFAC" else 1.0
        F = scale * np.kron(S_in, S_out)
    else:
        if kind == "TKFAC":
            root, pi = float(curvature.factors.delta) ** 0.5, 1.0
        else:
            root = 1.0
            pi = np.sqrt(np.trace(S_in) / d_in / (np.trace(S_out) / d_out))
        left = root * S_in + pi * damping**0.5 * np.eye(d_in)
        right = root * S_out + damping**0.5 / pi * np.eye(d_out)
        F, damping = np.kron(left, right), 0.0
    solved = np.linalg.solve(F + damping * np.eye(len(F)), M.flatten(order="F"))
    return solved.reshape(d_out, d_in, order="F")


def curvatures_and_matrices(kind, dtypes):
    draw = torch.Generator().manual_seed(50)
    curvatures, matrices = [], []
    for seed, (shape, dtype) in enumerate(zip(SHAPES, dtypes, strict=True)):
        curvatures.append(curvature_of(kind, *shape, seed, dtype))
        matrices.append(torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype))
    return curvatures, matrices


@every_rule
@every_kind
def test_every_layer_gets_what_its_own_matrix_gives(kind, rule):
    curvatures, matrices = curvatures_and_matrices(kind, [torch.float64] * 7)
    found = preconditioned(curvatures, matrices, DAMPINGS, rule)
    for one in zip(found, curvatures, matrices, DAMPINGS, strict=True):
        result, curvature, M, damping = one
        assert_close(result, direction_by_kronecker(kind, curvature, M, damping, rule), rtol=1e-10)


@every_rule
@every_kind
@pytest.mark.parametrize("mixed", [False, True], ids=["float64", "mixed dtypes"])
def test_together_is_as_alone(kind, rule, mixed):
    dtypes = [torch.float64, torch.float32] * 4 if mixed else [torch.float64] * 8
    curvatures, matrices = curvatures_and_matrices(kind, dtypes[:7])
    # () tensors are what the trace policy gives
    dampings = [torch.tensor(d, dtype=t) for d, t in zip(DAMPINGS, dtypes, strict=False)]
    for some in (DAMPINGS, dampings):
        found = preconditioned(curvatures, matrices, some, rule)
        for i, result in enumerate(found):
            (alone,) = preconditioned([curvatures[i]], [matrices[i]], [some[i]], rule)
            assert result.dtype == matrices[i].dtype
            assert result.shape == matrices[i].shape
            tolerance = 1e-12 if result.dtype == torch.float64 else 1e-5
            assert_close(result.double(), alone.double(), rtol=tolerance)


@every_kind
def test_the_order_of_layers_does_not_matter_and_none_is_fine(kind):
    curvatures, matrices = curvatures_and_matrices(kind, [torch.float64] * 7)
    found = preconditioned(curvatures, matrices, DAMPINGS, "paper")
    backwards = preconditioned(curvatures[::-1], matrices[::-1], DAMPINGS[::-1], "paper")
    for one, other in zip(found, backwards[::-1], strict=True):
        assert_close(one, other, rtol=1e-12)
    assert preconditioned([], [], [], "paper") == []


@every_kind
def test_nothing_that_goes_in_is_changed(kind):
    curvatures, matrices = curvatures_and_matrices(kind, [torch.float64] * 7)
    before = [M.clone() for M in matrices]
    states = [{k: v.clone() for k, v in vars(c).items() if torch.is_tensor(v)} for c in curvatures]
    for result in preconditioned(curvatures, matrices, DAMPINGS, "added"):
        result.zero_()
    assert all(torch.equal(*pair) for pair in zip(matrices, before, strict=True))
    for curvature, state in zip(curvatures, states, strict=True):
        assert all(torch.equal(getattr(curvature, name), t) for name, t in state.items())


@every_rule
@every_method
def test_a_step_of_layers_of_one_shape_uses_each_ones_curvature_and_group_damping(method, rule):
    """θ − α · direction of every layer's own gradient, by the matrix written out."""
    model = double_precision(
        lambda: nn.Sequential(
            *[part for _ in range(3) for part in (nn.Linear(4, 4), nn.Tanh())],
            nn.Linear(4, CLASSES),
        )
    )
    groups = [
        {"params": list(model[0].parameters()), "damping": 3.0},
        {"params": list(model[4].parameters()), "damping": 0.02},
    ]
    settings = {"momentum": 0.0, "damping": 0.4, "damping_rule": rule, "param_groups": groups}
    optimizer = method(model, 0.1, **settings, **EVERY_STEP)
    stream = list(batches((4,), 3, N=20))
    train(model, optimizer, stream[:2])
    backward(model, optimizer, *stream[2])

    def matrices(of):
        return [torch.cat([of(layer.weight), of(layer.bias)[:, None]], 1) for layer in layers]

    layers = optimizer.layers
    gradients = matrices(lambda p: p.grad.clone())
    before = matrices(lambda p: p.detach().clone())
    optimizer.step()
    after = matrices(lambda p: p.detach())
    for i, damping in enumerate((3.0, 0.4, 0.02, 0.4)):
        curvature = optimizer.curvatures[layers[i]]
        direction = direction_by_kronecker(method.__name__, curvature, gradients[i], damping, rule)
        assert_close(before[i] - after[i], 0.1 * direction, rtol=1e-8)
