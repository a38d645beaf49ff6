"""If this fails, a GPU computes another preconditioner than the NumPy reference does.

Every test runs on the CPU too, so that what is checked on a GPU is known to be right elsewhere.
"""

import io
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional

from tekfac_edu import reference
from tekfac_edu.optim import TEKFAC, Cost

from .networks import CASES, batches, cnn, mlp
from .oracles import (
    assert_close,
    cross_entropy,
    layer_rows,
    objectives_empirical,
    weight_matrix,
)
from .training import (
    EVERY_STEP,
    UNEVEN,
    all_finite,
    assert_same_bits,
    every_method,
    everything,
    seeded,
    train,
)

DAMPING = 0.05
every_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)
every_case = pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.name in ("Linear", "Linear, positions", "Conv2d, strided")],
    ids=lambda case: case.name,
)


@pytest.fixture(autouse=True)
def convolutions_in_whole_float32():
    """cuDNN's default is TF32, with 10 bits; matrix products have float32 by default."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def moved(batch, device, dtype=None):
    return [t.to(device, dtype if t.is_floating_point() else None) for t in batch]


def one_step(case, method, device, dtype):
    """Per layer: the optimizer's preconditioner after one step, as a function, and the reference.

    The function takes and gives NumPy matrices; the reference is fitted to the oracle's a and g.
    """
    model = case.make().to(device, dtype)
    optimizer = method(model, 5e-4, damping=DAMPING, **EVERY_STEP)
    x, y = moved(case.batch(), device, dtype)
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    for name in case.layers:
        pristine = case.make()
        module = pristine.get_submodule(name)
        a, g = layer_rows(pristine, module, objectives_empirical(cross_entropy), case.batch())
        precondition = partial(preconditioned, optimizer, model.get_submodule(name), device)
        yield precondition, getattr(reference, method.__name__).fit(a, g)


def preconditioned(optimizer, module, device, M):
    return optimizer.precondition(module, torch.from_numpy(M).to(device)).cpu().numpy()


def random_matrix(fitted):
    return np.random.default_rng(3).standard_normal(fitted.eigenvalues.shape)


@every_case
@every_device
@every_method
def test_in_float64_the_preconditioner_is_the_references_to_ten_digits(method, device, case):
    for precondition, fitted in one_step(case, method, device, torch.float64):
        M = random_matrix(fitted)
        assert_close(precondition(M), fitted.precondition(M, DAMPING))


@every_case
@every_device
@every_method
def test_in_float32_it_is_as_near_as_the_damped_matrix_allows(method, device, case):
    """Solving with a matrix of condition κ may lose κ roundings, and each factor is a few long."""
    for precondition, fitted in one_step(case, method, device, torch.float32):
        M = random_matrix(fitted)
        condition = np.linalg.cond(fitted.dense(DAMPING))
        tolerance = 10 * np.finfo(np.float32).eps * condition
        assert tolerance < 0.05, "this batch says nothing about float32"
        direction = precondition(M)
        assert direction.dtype == np.float32
        assert_close(direction.astype(np.float64), fitted.precondition(M, DAMPING), tolerance)


def twin_of(model):
    """The reference's MLP with the weights of ours."""
    twin = reference.MLP((4, 5, 3))
    twin.weights = [
        weight_matrix(layer.weight, layer.bias).copy() for layer in (model[0], model[2])
    ]
    return twin


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@every_device
@every_method
def test_five_steps_are_those_of_the_reference(method, device, fisher):
    model = mlp()
    settings = {"lr": 0.0025, "damping": DAMPING, "fisher": fisher, "momentum": 0.7}
    settings |= {"interval": UNEVEN["interval"]}
    twin, name = twin_of(model), method.__name__.lower()
    theirs = reference.NaturalGradient(twin, name, lr_scale="sgd", **settings)
    model.to(device)
    ours = method(model, warmup=0, **settings)
    for batch in batches((4,), 5):
        train(model, ours, [moved(batch, device)])
        theirs.step(*(t.numpy() for t in batch))
    model.cpu()
    for layer, expected in zip((model[0], model[2]), twin.weights, strict=True):
        assert_close(weight_matrix(layer.weight, layer.bias), expected)


@every_device
@every_method
def test_samples_are_drawn_there_and_decided_by_the_seed_alone(method, device):
    results = []
    for seed in (5, 5, 6):
        model = mlp().to(device)
        with seeded(seed):
            optimizer = method(model, 0.0025, fisher="mc", damping=DAMPING, **EVERY_STEP)
        before = torch.get_rng_state()
        train(model, optimizer, [moved(batch, device) for batch in batches((4,), 3)])
        assert torch.equal(torch.get_rng_state(), before)
        results.append(everything(model, optimizer))
    assert_same_bits(results[0]["model"], results[1]["model"])
    assert not torch.equal(results[0]["model"]["0.weight"], results[2]["model"]["0.weight"])


@pytest.mark.parametrize("fisher", ["empirical", "mc"])
@every_device
@every_method
def test_a_state_from_there_goes_on_here(method, device, fisher):
    """torch.load(map_location="cpu"); on the device itself training goes on bit for bit."""
    stream = list(batches((1, 6, 6), 5))
    there = [moved(batch, device) for batch in stream]
    model = cnn().to(device)
    optimizer = method(model, 0.0025, damping=DAMPING, fisher=fisher, **UNEVEN)
    train(model, optimizer, there[:3])
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    train(model, optimizer, there[3:])

    for where, data in ((device, there), ("cpu", stream)):
        file.seek(0)
        states = torch.load(file, map_location=where, weights_only=True)
        resumed = cnn().to(where)
        again = method(resumed, 0.0025, damping=DAMPING, fisher=fisher, **UNEVEN)
        resumed.load_state_dict(states[0])
        again.load_state_dict(states[1])
        train(resumed, again, data[3:])
        assert all_finite(resumed, again)
        assert {p.device.type for p in resumed.parameters()} == {where}
        if where == device:
            assert_same_bits(everything(resumed, again), everything(model, optimizer))
        elif fisher == "empirical":
            for p, q in zip(resumed.parameters(), model.parameters(), strict=True):
                assert_close(p, q.detach().cpu().numpy())


@every_device
@pytest.mark.parametrize("eigenbasis", ["eigh", "qr"])
def test_a_truncated_basis_is_orthonormal_and_keeps_the_trace(device, eigenbasis):
    def curvatures(**cost):
        model = cnn().to(device)
        optimizer = TEKFAC(model, 1e-4, cost=Cost(**cost), **EVERY_STEP)
        x, y = moved(next(iter(batches((1, 6, 6), 8))), device)
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        return list(optimizer.curvatures.values())

    whole, cut = curvatures(), curvatures(input_rank=3, eigenbasis=eigenbasis)
    for full, part in zip(whole, cut, strict=True):
        Q_in = part.basis.Q_in
        assert Q_in.device.type == device and Q_in.shape[1] == 3
        assert_close((Q_in.T @ Q_in).cpu(), np.eye(3))
        assert_close(part.trace.cpu(), full.trace.item())
