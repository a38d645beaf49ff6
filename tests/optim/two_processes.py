"""What each of two processes does for test_distributed.py; importable, because it is spawned."""

import warnings

import torch
from torch import distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from .training import METHODS, train

FISHERS = ["empirical", "exact"]
STEPS = 4
INTERVALS = {"interval": (1, 2, 1), "warmup": 0}
LAYERS = 3
N = 32


def half_of(rank, N=N):
    return slice(N // 2 * rank, N // 2 * (rank + 1))


def network():
    """A convolution and two dense layers, without batch norm, which would couple the examples."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 5), nn.Tanh()
    return nn.Sequential(*layers, nn.Linear(5, 3)).double()


def stream(steps=STEPS, N=N):
    """Examples of uneven size, and more than d_in = 19 of them: else a basis is not unique."""
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(N, 1, 5, 5, generator=draw, dtype=torch.float64)
        yield x * torch.linspace(0.3, 2.0, N).reshape(-1, 1, 1, 1), torch.arange(N) % 3


def run(called, optimizer, part=slice(None)):
    """All steps, on a part of every batch."""
    train(called, optimizer, ((x[part], y[part]) for x, y in stream()))


def result(model, optimizer):
    return {"model": model.state_dict(), "curvatures": optimizer.state_dict()["curvatures"]}


def optimizer_for(model, method, fisher, **options):
    return method(model, 0.5, damping=0.1, fisher=fisher, **INTERVALS, **options)


class Counted:
    """A function that counts its calls, in place of an attribute."""

    def __init__(self, owner, name):
        self.owner, self.name, self.function = owner, name, getattr(owner, name)
        self.calls = 0

    def __enter__(self):
        setattr(self.owner, self.name, self)
        return self

    def __exit__(self, *_):
        setattr(self.owner, self.name, self.function)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.function(*args, **kwargs)


def play(rank):
    """Train every method on this rank's half of the batches; what came out."""
    half = half_of(rank)
    results = {}
    for method in METHODS:
        for fisher in FISHERS:
            model = network()
            wrapped = DistributedDataParallel(model)
            optimizer = optimizer_for(wrapped, method, fisher)
            with Counted(torch.linalg, "eigh") as eigh:
                run(wrapped, optimizer, half)
            counted = {"decompositions": eigh.calls}
            results[method.__name__, fisher] = result(model, optimizer) | counted
        model = network()
        optimizer = optimizer_for(model, method, "empirical", process_group=None)
        sums, broadcasts = Counted(distributed, "all_reduce"), Counted(distributed, "broadcast")
        with sums, broadcasts:
            run(model, optimizer, half)
        messages = {"messages": sums.calls + broadcasts.calls}
        results[method.__name__, "alone"] = result(model, optimizer) | messages
    results["skipped"] = skipped_step(METHODS[-1], half)
    results["samples"] = {group or "alone": samples(group) for group in ("default", None)}
    return results


def skipped_step(method, half):
    """A NaN on one rank reaches all through the summed gradient: both skip, and go on together."""
    model = network()
    wrapped = DistributedDataParallel(model)
    optimizer = optimizer_for(wrapped, method, "empirical")
    x, y = next(stream())
    x = x.clone()
    x[0, 0, 0, 0] = torch.nan
    functional.cross_entropy(wrapped(x[half]), y[half]).backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    after = {name: p.clone() for name, p in model.state_dict().items()}
    run(wrapped, optimizer, half)
    return {"warnings": len(caught), "after": after, **result(model, optimizer)}


def samples(process_group):
    """What the outputs of the whole batch send back under fisher="mc"; one seed on both ranks."""
    model = network()
    optimizer = METHODS[0](model, 0.5, fisher="mc", process_group=process_group)
    x, _ = next(stream())
    optimizer.accumulate_fisher(model(x))
    (last,) = [use for use in optimizer.capture.uses if use.layer.module is model[-1]]
    return last.gradients[0]
