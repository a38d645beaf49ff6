"""What each of two processes does for test_draws_on_ranks.py; importable, because it is spawned."""

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tekfac_edu.optim import Cost
from tekfac_edu.optim.batch import Chunk

from . import two_processes
from .training import METHODS, backward
from .two_processes import network, result

N, STEPS = 8, 7
PERIODS = {"interval": (2, 4, 2), "warmup": 0}
DRAWN = {
    "rows": {"cost": Cost(factor_rows=0.7)},
    "turns": {"cost": Cost(stagger=True)},
    "all": {"cost": Cost(factor_rows=1, eigenvalue_examples=4, stagger=True), "warmup": 2},
}
EXAMPLES = [4, 5, N, 3 * N]


def half_of(rank):
    return two_processes.half_of(rank, N)


def stream(steps=STEPS):
    return two_processes.stream(steps, N)


class Watched:
    """Notes, while it is on, how many rows and examples statistics are taken from."""

    def __enter__(self):
        self.counted, self.examples = [], []
        self.ordinary = Chunk.rows, Chunk.statistic

        def rows(chunk):
            a, g = self.ordinary[0](chunk)
            if isinstance(chunk.layer.module, nn.Conv2d):
                self.counted.append(a.shape[:2].numel())
            return a, g

        def statistic(chunk, formula, *arguments):
            self.examples.append(len(chunk))
            Chunk.rows = self.ordinary[0]  # what it needs itself is not for factors
            D = self.ordinary[1](chunk, formula, *arguments)
            Chunk.rows = rows
            return D

        Chunk.rows, Chunk.statistic = rows, statistic
        return self

    def __exit__(self, *_):
        Chunk.rows, Chunk.statistic = self.ordinary


def trained(method, steps, part, **options):
    """A run over all ranks; what came out, and what each layer's statistics were taken from."""
    model = network()
    wrapped = DistributedDataParallel(model)
    optimizer = method(wrapped, 0.5, damping=0.1, **options)
    refreshed = []
    with Watched() as watched:
        for x, y in stream(steps):
            backward(wrapped, optimizer, x[part], y[part])
            step = optimizer.steps
            optimizer.step()
            refreshed.append([c.basis_step == step for c in optimizer.curvatures.values()])
    seen = {"rows": watched.counted, "examples": watched.examples, "refreshed": refreshed}
    return result(model, optimizer) | seen


def play(rank):
    half, results = half_of(rank), {}
    for method in METHODS:
        for name, options in DRAWN.items():
            results[method.__name__, name] = trained(method, STEPS, half, **PERIODS | options)
    for n in EXAMPLES:
        cost = Cost(eigenvalue_examples=n)
        results["examples", n] = trained(METHODS[-1], 1, half, cost=cost)
    return results
