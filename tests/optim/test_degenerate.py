"""If this fails, a run breaks on data that carries little or nothing: dead inputs, dead units, one
example, one class, vanishing or huge gradients.
"""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from tekfac_edu.optim import KFAC, TEKFAC, Added, ByTrace, Cost, Paper

from .networks import CLASSES
from .one_step import every_basis
from .training import EVERY_STEP, all_finite, every_method, parameters

INTERVALS = [EVERY_STEP, {"interval": (1, 5, 2), "warmup": 0}]


@pytest.fixture(autouse=True)
def no_warning_passes_unseen():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def network(dead_unit=True):
    """6-8-3 with ReLU in float32; a bias of -100 keeps one hidden unit at zero for ever."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    if dead_unit:
        with torch.no_grad():
            model[0].bias[2] = -100.0
    return model


def picture(seed, N=16):
    """Two of six pixels are always zero; the class is where the largest of the others is."""
    x = torch.randn(N, 6, generator=torch.Generator().manual_seed(seed))
    x[:, [1, 4]] = 0
    return x, x[:, [0, 2, 3]].argmax(1)


def run(model, optimizer, stream, scale=1.0):
    losses = []
    for x, y in stream:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        (scale * loss).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("intervals", INTERVALS, ids=["every step", "seldom"])
@every_basis
def test_dead_pixels_and_dead_units_train_for_200_steps(method, intervals, eigenbasis):
    model = network()
    cost = Cost(eigenbasis=eigenbasis)
    optimizer = method(model, 0.1, damping=1e-2, cost=cost, **intervals)
    start = model[0].weight.detach().clone()
    losses = run(model, optimizer, [picture(seed) for seed in range(200)])
    assert all_finite(model, optimizer)
    assert sum(losses[-20:]) / 20 < 0.5 * sum(losses[:5]) / 5
    # No gradient ever reached these, only the rounding of Q, 200 times, at lr / (1 − momentum) = 1.
    rounding = {"rtol": 0, "atol": 200 * torch.finfo(torch.float32).eps}
    assert torch.allclose(model[0].weight[2], start[2], **rounding)
    assert torch.allclose(model[0].weight[:, [1, 4]], start[:, [1, 4]], **rounding)


@every_method
def test_zero_gradients_move_nothing(method):
    """Not even after a long silence, and the first real gradient finds a usable curvature."""
    model = network()
    optimizer = method(model, 0.1, damping=1e-2, **EVERY_STEP)
    before = parameters(model)
    run(model, optimizer, [picture(seed) for seed in range(20)], scale=0.0)
    assert torch.equal(parameters(model), before)
    losses = run(model, optimizer, [picture(seed) for seed in range(200)])
    assert all_finite(model, optimizer)
    assert sum(losses[-20:]) / 20 < 0.5 * losses[0]


@every_method
def test_zero_gradients_after_real_ones_leave_no_trace_of_nan(method):
    model = network()
    optimizer = method(model, 50.0, damping=1e-3, **EVERY_STEP)
    run(model, optimizer, [picture(0)])
    run(model, optimizer, [picture(seed) for seed in range(200)], scale=0.0)
    assert all_finite(model, optimizer)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-6, 1e6, 1e12])
@every_method
def test_gradients_of_any_size_that_float32_can_square_stay_finite(method, scale):
    model = network()
    optimizer = method(model, min(10.0, 10.0 / scale), damping=1e-3, **EVERY_STEP)
    run(model, optimizer, [picture(seed) for seed in range(10)], scale)
    assert all_finite(model, optimizer)


@every_method
def test_tiny_gradients_are_a_step_of_sgd_under_the_damping(method):
    """With D far below λ the direction is the gradient: in float32 as in the formula."""
    scale, lr = 1e-12, 1.0
    model, plain = network(), network()
    # KFAC and TKFAC split the damping; here it is D + λ for all four.
    optimizer = method(model, lr, damping=Added(1e-3), momentum=0.0, **EVERY_STEP)
    run(model, optimizer, [picture(0)], scale)
    sgd = torch.optim.SGD(plain.parameters(), lr)
    run(plain, sgd, [picture(0)], scale)
    for p, q, start in zip(
        model.parameters(), plain.parameters(), network().parameters(), strict=True
    ):
        assert torch.allclose(p - start, q - start, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("scale", [1e20, 1e30])
@pytest.mark.parametrize("steps", [0, 3])
@every_method
def test_gradients_too_large_to_square_are_said_to_be(method, scale, steps):
    """Finite gradients, infinite statistics: a warning that names the layer, and no crash."""
    model = network(dead_unit=False)
    optimizer = method(model, 1e-37, damping=1e-3, **EVERY_STEP)
    run(model, optimizer, [picture(seed) for seed in range(steps)])
    with pytest.warns(RuntimeWarning) as caught:
        run(model, optimizer, [picture(9)], scale)
    assert "0 (Linear)" in str(caught[0].message) and "not finite" in str(caught[0].message)
    assert all(p.isfinite().all() for p in model.parameters())
    run(model, optimizer, [picture(10)])
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("fisher", ["empirical", "mc", "exact"])
@every_method
def test_batches_of_one_example_and_batches_of_one_class(method, fisher):
    for N, one_class in ((1, False), (16, True)):
        model = network()
        optimizer = method(model, 2.0, damping=1e-2, fisher=fisher, **EVERY_STEP)
        for seed in range(60):
            x, y = picture(seed, N)
            y = torch.full_like(y, seed % CLASSES) if one_class else y
            optimizer.zero_grad()
            outputs = model(x)
            if fisher != "empirical":
                optimizer.accumulate_fisher(outputs)
            functional.cross_entropy(outputs, y).backward()
            optimizer.step()
        assert all_finite(model, optimizer)


@pytest.mark.parametrize("rule", [Paper, Added])
@every_method
def test_a_layer_that_sees_nothing_but_zeros(method, rule):
    """Without a bias its factor of inputs is zero, and with it every scale that splits λ."""
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, CLASSES))
    optimizer = method(model, 10.0, damping=rule(1e-2), **EVERY_STEP)
    before = model[0].weight.detach().clone()
    x, y = picture(0)
    run(model, optimizer, [(0 * x, y)] * 5)
    assert all_finite(model, optimizer)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_dead_convolution_damped_by_its_trace_has_the_floor_as_damping(groups):
    """dim is 2 · 19 of the whole one, 2 · 10 of the one in groups."""
    model = nn.Sequential(
        nn.Conv2d(2, 2, 3, groups=groups), nn.ReLU(), nn.Flatten(), nn.Linear(8, CLASSES)
    )
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    optimizer = TEKFAC(model, 10.0, damping=ByTrace(0.5, floor=1e-4), **EVERY_STEP)
    x = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    run(model, optimizer, [(x, torch.arange(8) % CLASSES)] * 3)
    rows = {row.name: row for row in optimizer.report().rows}
    dim = {1: 38, 2: 20}[groups]
    assert rows["0"].damping == pytest.approx(1e-4 / dim)
    assert rows["3"].damping == pytest.approx(0.5 * 1e-4 / dim)
    assert all_finite(model, optimizer)


@every_basis
def test_a_group_that_sees_nothing_and_one_that_is_never_used_train_beside_the_others(
    method, eigenbasis
):
    """Of a depthwise convolution: a dead channel, and one whose output meets zeros."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 4, 2, groups=4, bias=False), nn.Flatten(), nn.Linear(16, CLASSES)
    )
    with torch.no_grad():
        model[2].weight[:, 4:8] = 0.0
    model[2].weight.register_hook(lambda gradient: gradient.index_fill(1, torch.arange(4, 8), 0.0))
    dead = [model[0].weight[group].detach().clone() for group in (0, 1)]
    x, y = torch.randn(40, 4, 3, 3), torch.arange(40) % CLASSES
    x = x + y[:, None, None, None]
    x[:, 0] = 0
    cost = Cost(eigenbasis=eigenbasis)
    optimizer = method(model, 0.05, damping=1e-2, cost=cost, plain=["2"], **EVERY_STEP)
    losses = run(model, optimizer, [(x, y)] * 60)
    assert all_finite(model, optimizer)
    assert losses[-1] < 0.7 * losses[0]
    for group in (0, 1):
        assert torch.allclose(model[0].weight[group], dead[group], rtol=0, atol=1e-5)


def test_a_layer_of_one_input_and_one_output():
    model = nn.Linear(1, 1, bias=False)
    optimizer = KFAC(model, 1.0, damping=0.1, **EVERY_STEP)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 1)).square().mean().backward()
        optimizer.step()
    assert all_finite(model, optimizer)
