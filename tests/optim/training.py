"""Ordinary training steps, and whether two runs ended alike to the last bit."""

from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional

from tekfac_edu.optim import EKFAC, KFAC, TEKFAC, TKFAC

METHODS = [KFAC, EKFAC, TKFAC, TEKFAC]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)

EVERY_STEP = {"interval": 1, "warmup": 0}
UNEVEN = {"interval": (2, 3, 1), "warmup": 0}


@contextmanager
def seeded(seed):
    """Within it torch.manual_seed(seed) holds, for an optimizer that is built; not after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def backward(model, optimizer, x, y):
    """zero_grad, forward, statistics if they are asked for, backward; the loss."""
    optimizer.zero_grad()
    outputs = model(x)
    if getattr(optimizer, "settings", None) and optimizer.settings.fisher != "empirical":
        optimizer.accumulate_fisher(outputs)
    loss = functional.cross_entropy(outputs, y)
    loss.backward()
    return loss


def train(model, optimizer, stream):
    """One step for every batch of the stream; the losses."""
    losses = []
    for x, y in stream:
        losses.append(backward(model, optimizer, x, y).item())
        optimizer.step()
    return losses


def everything(model, optimizer):
    """All that a run remembers, copied so that further training does not change it."""
    return _copied({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


def parameters(model):
    """All parameters as one vector, copied."""
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def all_finite(model, optimizer):
    """Whether parameters, buffers, momenta and statistics all are."""
    return all(t.isfinite().all() for t in _tensors(everything(model, optimizer)))


def differences(one, other, path=""):
    """Paths at which two nested states differ in any bit, type or key."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = [f"{path}/{key}" for key in one.keys() ^ other.keys()]
        for key in one.keys() & other.keys():
            found += differences(one[key], other[key], f"{path}/{key}")
        return found
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for i, pair in pairs for found in differences(*pair, f"{path}/{i}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
    else:
        same = type(one) is type(other) and one == other
    return [] if same else [path]


def assert_same_bits(one, other):
    """Fail with the paths that differ; NaN counts as different from itself."""
    assert differences(one, other) == []


def _copied(value):
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value.values() for t in _tensors(item)] if isinstance(value, dict) else []
