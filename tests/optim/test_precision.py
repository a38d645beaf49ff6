"""If this fails, half precision breaks a run, or its statistics are taken in half precision too."""

import pytest
import torch
from torch.nn import functional

from tekfac_edu.optim import Cost

from .networks import NETWORKS, batches, cnn, mlp
from .training import EVERY_STEP, UNEVEN, all_finite, every_method, parameters, train


def statistics(optimizer):
    for curvature in optimizer.state_dict()["curvatures"].values():
        for key in ("factors", "basis", "eigenvalues"):
            yield from curvature[key].values()


def run(model, method, fisher, autocast):
    """Six steps; the optimizer and the losses."""
    optimizer = method(model, 0.2, damping=0.1, fisher=fisher, **UNEVEN)
    losses = []
    for x, y in batches((1, 6, 6), 6):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = model(x.float())
            if fisher != "empirical":
                optimizer.accumulate_fisher(outputs)
            loss = functional.cross_entropy(outputs, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return optimizer, torch.tensor(losses)


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@every_method
def test_autocast_gives_float32_statistics_and_nearly_the_float32_run(method, fisher):
    """bfloat16 has 8 bits: numbers are off by up to 0.4 %, losses and steps by a few per cent."""
    plain, cast = cnn().float(), cnn().float()
    start = parameters(plain)
    _, expected = run(plain, method, fisher, autocast=False)
    optimizer, losses = run(cast, method, fisher, autocast=True)
    assert {t.dtype for t in statistics(optimizer)} == {torch.float32}
    assert torch.allclose(losses, expected, rtol=0.03, atol=0)
    moved, moved_cast = parameters(plain) - start, parameters(cast) - start
    assert (moved - moved_cast).norm() < 0.1 * moved.norm()
    assert (moved - moved_cast).norm() > 0, "autocast did nothing"


BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}  # of what is moved


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("cost", [Cost(), Cost(input_rank=2)], ids=["whole", "truncated"])
@pytest.mark.parametrize("network", ["dense", "groups"])
@every_method
def test_narrow_parameters_have_float32_statistics_and_keep_their_dtype(
    method, network, cost, dtype
):
    make, shape = NETWORKS[network]
    model, exact, start = make().to(dtype), make(), parameters(make())
    stream = [(x.to(dtype), y) for x, y in batches(shape, 4)]
    for m, inputs in ((model, stream), (exact, [(x.double(), y) for x, y in stream])):
        optimizer = method(m, 0.5, damping=0.1, cost=cost, **EVERY_STEP)
        train(m, optimizer, inputs)
        kinds = torch.float64 if m is exact else torch.float32
        assert {t.dtype for t in statistics(optimizer)} == {kinds}
        assert all_finite(m, optimizer)
    assert {p.dtype for p in model.parameters()} == {dtype}
    moved = parameters(exact) - start
    assert (parameters(model) - start - moved).norm() < BOUNDS[dtype] * moved.norm()


@every_method
def test_a_step_under_autocast_is_a_step_without(method):
    """Some loops have the whole iteration inside the context."""
    inside, outside = mlp().float(), mlp().float()
    stream = [(x.float(), y) for x, y in batches((4,), 3)]
    for model, everywhere in ((inside, True), (outside, False)):
        optimizer = method(model, 1.0, damping=0.1, **UNEVEN)
        for x, y in stream:
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=everywhere):
                optimizer.step()
    assert torch.equal(parameters(inside), parameters(outside))


@every_method
def test_precondition_and_report_are_the_same_under_autocast(method):
    model = mlp().float()
    optimizer = method(model, 1.0, damping=0.1, **UNEVEN)
    train(model, optimizer, [(x.float(), y) for x, y in batches((4,), 2)])
    M = torch.ones(5, 5)
    expected, cosine = optimizer.precondition(model[0], M), optimizer.report().rows[0].cosine
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(optimizer.precondition(model[0], M), expected)
        assert optimizer.report().rows[0].cosine == cosine


@every_method
def test_layers_of_two_precisions_train_side_by_side(method):
    model = mlp().float()
    model[2].double()
    optimizer = method(model, 0.5, damping=0.1, **UNEVEN)
    for x, y in batches((4,), 4):
        optimizer.zero_grad()
        functional.cross_entropy(model[2](model[1](model[0](x.float())).double()), y).backward()
        optimizer.step()
    assert {t.dtype for t in statistics(optimizer)} == {torch.float32, torch.float64}
    assert all_finite(model, optimizer)
