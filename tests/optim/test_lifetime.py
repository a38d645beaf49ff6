"""If this fails, memory is held that nobody can use any more.

Nothing here waits for the garbage collector: what is deleted must go at once.
"""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tekfac_edu.optim import TEKFAC

from .networks import batches, cnn, mlp
from .training import UNEVEN, backward, every_method, train

every_fisher = pytest.mark.parametrize("fisher", ["empirical", "mc", "exact"])


@pytest.fixture(autouse=True, scope="module")
def without_the_garbage_collector():
    """The first optimizer of a process imports parts of torch, whose frames hold it: not ours."""
    torch.optim.SGD([torch.zeros(1)], 0.1)
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


def hooks(model):
    return [hook for module in model.modules() for hook in module._forward_hooks]


def is_held(storage):
    return not storage.expired()


def watched_storage(tensor):
    return StorageWeakRef(tensor.untyped_storage())


@pytest.mark.parametrize("steps", [0, 1, 2])
@every_fisher
@every_method
def test_an_optimizer_goes_when_it_is_deleted_and_leaves_no_hooks(method, fisher, steps):
    model = mlp()
    optimizer = method(model, 1e-3, fisher=fisher, **UNEVEN)
    train(model, optimizer, batches((4,), steps))
    optimizer.state_dict(), optimizer.report(), repr(optimizer)
    loss = backward(model, optimizer, *next(batches((4,), 1)))
    assert hooks(model)
    gone = weakref.ref(optimizer)
    del optimizer
    assert gone() is None
    assert hooks(model) == []
    assert loss.grad_fn is not None


@every_fisher
@every_method
def test_model_and_optimizer_go_when_they_are_deleted(method, fisher):
    model = cnn()
    optimizer = method(model, 1e-3, fisher=fisher, **UNEVEN)
    train(model, optimizer, batches((1, 6, 6), 3))
    backward(model, optimizer, *next(batches((1, 6, 6), 1)))
    objects = [model, optimizer, *model.modules(), *model.parameters()]
    gone = [weakref.ref(item) for item in objects]
    tensors = [watched_storage(p) for p in model.parameters()]
    del objects, model, optimizer
    assert [ref() for ref in gone if ref() is not None] == []
    assert not any(is_held(storage) for storage in tensors)


def test_a_refused_optimizer_leaves_no_hooks():
    model = mlp()
    for settings in ({"lr": -1.0}, {"lr": 0.1, "plain": ["x"]}, {"lr": 0.1, "damping": 0.0}):
        with pytest.raises(ValueError):
            TEKFAC(model, **settings)
    assert hooks(model) == []


def test_new_settings_and_a_loaded_state_leave_one_hook_a_layer():
    model = mlp()
    optimizer = TEKFAC(model, 1e-3, **UNEVEN)
    optimizer.take(replace(optimizer.settings, fisher="exact"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert len(hooks(model)) == 2


def size_of_memory(value, seen):
    """How many things hang on an object: entries of all containers that can be reached from it."""
    if id(value) in seen or isinstance(value, torch.Tensor | torch.nn.Module | type):
        return 0
    seen.add(id(value))
    if isinstance(value, dict):
        inside = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set | frozenset):
        inside = list(value)
    else:
        inside = list(vars(value).values()) if hasattr(value, "__dict__") else []
    return len(inside) + sum(size_of_memory(item, seen) for item in inside)


@every_fisher
@every_method
def test_nothing_grows_from_one_period_of_intervals_to_the_next(method, fisher):
    """Live tensors, and all that hangs on the optimizer, after steps 6, 12, 18 of 2, 3, 1."""
    model = mlp()
    optimizer = method(model, 1e-3, fisher=fisher, **UNEVEN)
    stream = list(batches((4,), 6))
    counts = []
    for _ in range(3):
        train(model, optimizer, stream)
        tensors = sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())
        counts.append((tensors, size_of_memory(optimizer, set())))
    assert counts[1:] == counts[:-1]
    assert counts[0][1] > 50
