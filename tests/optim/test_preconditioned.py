"""If this fails, a layer takes a step by the curvature or the damping of another."""

import numpy as np
import pytest
import torch
from torch import nn

from tekfac_edu.optim import KFAC, TKFAC, Added, Cost, Paper
from tekfac_edu.optim import curvature as curvature_module
from tekfac_edu.optim.curvature import LayerCurvature, preconditioned
from tekfac_edu.optim.layers import factored_layer
from tekfac_edu.optim.settings import Settings

from .networks import CLASSES, NETWORKS, batches, double_precision, gaussian
from .one_step import CORRECTED
from .oracles import assert_close, by_group, matrices, vec
from .training import EVERY_STEP, backward, every_method, train

every_rule = pytest.mark.parametrize("rule", [Paper, Added])
# Three of one shape, two of another, one by itself, the transposed shape, and two in groups.
SHAPES = [(3, 5), (4, 4), (3, 5), (2, 3, 4), (5, 3), (4, 4), (2, 7), (3, 5), (2, 3, 4)]
DAMPINGS = [0.5, 0.01, 2.0, 0.3, 0.1, 3.0, 1e-4, 0.02, 0.7]


def settings_of(rule):
    """Of which only the rule counts here; its own λ is not one of the layers'."""
    return Settings("empirical", (1, 1, 1), 0.95, 0, None, "apart", rule(1.0), Cost(), 0)


def layer_of(*shape, dtype=torch.float64):
    """Linear, or in groups a convolution with kernels of one row."""
    if len(shape) == 2:
        module = nn.Linear(*shape[::-1], bias=False)
    else:
        groups, d_out, d_in = shape
        module = nn.Conv1d(groups, groups * d_out, d_in, groups=groups, bias=False)
    return factored_layer("name", module.to(dtype), False)


def curvature_of(method, shape, seed, dtype=torch.float64):
    """As after one step with uneven examples."""
    layer = layer_of(*shape, dtype=dtype)
    *blocks, d_out, d_in = shape
    size = gaussian(20, 1, seed=seed).abs() + 0.1 * seed + 0.1
    a, g = ((size * gaussian(*blocks, 20, d, seed=seed + 100 * d)).to(dtype) for d in (d_in, d_out))
    curvature = LayerCurvature(layer, method, Cost())
    curvature.average_factors(layer.each_block(method.factors)(a, g), 0.95)
    curvature.turn_to(curvature.decompose(), 0)
    if method in CORRECTED:
        curvature.average_eigenvalues(gaussian(*shape, seed=seed).abs().to(dtype), 0.95, 0)
    return curvature


def direction_by_kronecker(method, curvature, M, damping, rule):
    """(F̂ + damping)⁻¹ vec M, the matrix written out and solved with, in float64 NumPy."""

    def of_one_group(S_in, S_out, scale, Q_in, Q_out, D, M):
        d_out, d_in = M.shape
        if method in CORRECTED:
            Q = np.kron(Q_in, Q_out)
            damped = (Q * vec(D)) @ Q.T + damping * np.eye(d_in * d_out)
        elif rule is Added:
            damped = scale * np.kron(S_in, S_out) + damping * np.eye(d_in * d_out)
        else:
            root, pi = scale**0.5, 1.0
            if method is KFAC:
                pi = np.sqrt(np.trace(S_in) / d_in / (np.trace(S_out) / d_out))
            left = root * S_in + pi * damping**0.5 * np.eye(d_in)
            right = root * S_out + damping**0.5 / pi * np.eye(d_out)
            damped = np.kron(left, right)
        return np.linalg.solve(damped, vec(M)).reshape(d_out, d_in, order="F")

    factors = curvature.factors
    sides = factors.S_in, factors.S_out, factors.scale, *curvature.basis
    tensors = [t.double().numpy() for t in (*sides, curvature.eigenvalues.D, M)]
    return by_group(curvature.layer.module, of_one_group, *tensors)


def problem(method, dtypes=None):
    """Curvatures, matrices and dampings, each a dict by layer; float64 unless dtypes are given."""
    dtypes = dtypes or [torch.float64 for _ in SHAPES]
    curvatures, found, dampings = {}, {}, {}
    for seed, (shape, damping, dtype) in enumerate(zip(SHAPES, DAMPINGS, dtypes, strict=True)):
        curvature = curvature_of(method, shape, seed, dtype)
        curvatures[curvature.layer] = curvature
        found[curvature.layer] = gaussian(*shape, seed=50 + seed).to(dtype)
        dampings[curvature.layer] = damping
    return curvatures, found, dampings


@every_rule
@every_method
def test_every_layer_gets_what_its_own_matrix_gives(method, rule):
    curvatures, M, dampings = problem(method)
    found = preconditioned(curvatures, M, dampings, settings_of(rule))
    assert list(found) == list(M)
    for layer, result in found.items():
        args = method, curvatures[layer], M[layer], dampings[layer], rule
        assert_close(result, direction_by_kronecker(*args))


@pytest.mark.parametrize("large", [0, 2**18], ids=["all by themselves", "alike together"])
@every_rule
@every_method
@pytest.mark.parametrize("mixed", [False, True], ids=["float64", "mixed dtypes"])
def test_together_is_as_alone(method, rule, mixed, large, monkeypatch):
    monkeypatch.setattr(curvature_module, "LARGE", large)
    dtypes = [(torch.float64, torch.float32)[mixed and i % 2] for i in range(len(SHAPES))]
    curvatures, M, dampings = problem(method, dtypes)
    # () tensors are what `ByTrace` gives
    tensors = {layer: torch.tensor(d, dtype=M[layer].dtype) for layer, d in dampings.items()}
    for given in (dampings, tensors):
        found = preconditioned(curvatures, M, given, settings_of(rule))
        for layer, result in found.items():
            one = {layer: M[layer]}
            alone = preconditioned(curvatures, one, given, settings_of(rule))[layer]
            assert result.dtype == M[layer].dtype
            tolerance = 1e-12 if result.dtype == torch.float64 else 1e-5
            assert_close(result.double(), alone.double(), rtol=tolerance)


@every_method
def test_a_layer_without_curvature_gets_zeros_and_no_layers_nothing(method):
    curvatures, M, dampings = problem(method)
    layer = next(iter(M))
    expected = preconditioned(curvatures, M, dampings, settings_of(Paper))
    curvatures[layer] = LayerCurvature(layer, method, Cost())
    found = preconditioned(curvatures, M, dampings, settings_of(Paper))
    assert torch.equal(found[layer], torch.zeros_like(M[layer]))
    for other in list(M)[1:]:
        assert_close(found[other], expected[other], rtol=1e-12)
    assert preconditioned({}, {}, {}, settings_of(Paper)) == {}


@every_method
def test_nothing_that_goes_in_is_changed(method):
    curvatures, M, dampings = problem(method)
    tensors = [*M.values()]
    for curvature in curvatures.values():
        tensors += [*curvature.factors, *curvature.basis, *curvature.eigenvalues]
    before = [t.clone() for t in tensors]
    for result in preconditioned(curvatures, M, dampings, settings_of(Added)).values():
        result.zero_()
    assert all(map(torch.equal, tensors, before))


@every_rule
@pytest.mark.parametrize("network", ["alike", "groups"])
@every_method
def test_a_step_uses_each_layer_s_curvature_and_group_damping(method, network, rule):
    """θ − α · λ · direction of every layer's own gradient, by the matrix written out."""
    make, shape = NETWORKS.get(network, (four_layers_alike, (4,)))
    model = make()
    groups = [
        {"params": list(model[0].parameters()), "damping": 3.0},
        {"params": list(model[4].parameters()), "damping": 0.02},
    ]
    settings = {"momentum": 0.0, "damping": rule(0.4), "param_groups": groups}
    optimizer = method(model, 0.1, **settings, **EVERY_STEP)
    stream = list(batches(shape, 3, N=20))
    train(model, optimizer, stream[:2])
    backward(model, optimizer, *stream[2])
    layers = optimizer.layers

    def of_layers(tensor_of):
        return [
            matrices(layer.module, [tensor_of(p) for p in layer.module.parameters()])
            for layer in layers
        ]

    gradients = of_layers(lambda p: p.grad.clone())
    before = of_layers(lambda p: p.detach().clone())
    optimizer.step()
    after = of_layers(lambda p: p.detach())
    for i, damping in enumerate((3.0, 0.4, 0.02, 0.4)):
        curvature, M = optimizer.curvatures[layers[i]], torch.tensor(gradients[i])
        direction = damping * direction_by_kronecker(method, curvature, M, damping, rule)
        assert_close(before[i] - after[i], 0.1 * direction, rtol=1e-8)


def four_layers_alike():
    layers = [part for _ in range(3) for part in (nn.Linear(4, 4), nn.Tanh())]
    return double_precision(lambda: nn.Sequential(*layers, nn.Linear(4, CLASSES)))


def test_the_layers_of_the_tests_have_the_shapes_they_should():
    for shape in SHAPES:
        assert curvature_of(TKFAC, shape, 0).layer.shape == shape


@every_method
def test_a_truncated_layer_is_not_stacked_with_a_whole_one_of_its_width(method):
    """Of 5 inputs 4 are kept, and D has 5 columns, as beside; both in the midst of a change."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    optimizer = method(model, 0.1, damping=0.1, **EVERY_STEP)
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model(x).square().sum(1).mean().backward()
    optimizer.step()
    first = optimizer.curvatures[optimizer.layers[0]]
    first.cost = Cost(input_rank=4)
    first.turn_to(first.decompose(), 1)
    M = {layer: layer.gradient() for layer in optimizer.layers}
    arguments = optimizer.dampings(), optimizer.settings
    together = preconditioned(optimizer.curvatures, M, *arguments)
    for layer, result in together.items():
        alone = preconditioned(optimizer.curvatures, {layer: M[layer]}, *arguments)[layer]
        assert_close(result, alone.numpy(), rtol=1e-12)
