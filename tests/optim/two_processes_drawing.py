"""What each of two processes does for test_draws_on_ranks.py; importable, because it is spawned."""

import os

import torch
from torch import distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from tekfac_edu.optim.batch import Examples

from .two_processes import METHODS, network, result

N, STEPS = 8, 7
PERIODS = {"factor_interval": 2, "eigen_interval": 4, "scale_interval": 2}
DRAWN = {
    "rows": {"factor_rows": 0.7},
    "turns": {"stagger": True},
    "all": {"factor_rows": 1, "scale_examples": 4, "stagger": True, "warmup_steps": 2},
}
SCALE_EXAMPLES = [4, 5, N, 3 * N]


def half_of(rank):
    return slice(N // 2 * rank, N // 2 * (rank + 1))


def stream(steps=STEPS):
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(N, 1, 5, 5, generator=draw, dtype=torch.float64)
        yield x * torch.linspace(0.3, 2.0, N).reshape(-1, 1, 1, 1), torch.arange(N) % 3


class Watched:
    """Notes, while it is on, how many rows and examples statistics are taken from."""

    def __enter__(self):
        self.rows, self.examples = [], []
        self.pair, self.measure = Examples.pair, Examples.corrected_eigenvalues

        def pair(examples):
            a, g = self.pair(examples)
            if isinstance(examples.module, nn.Conv2d):
                self.rows.append(a.shape[:2].numel())
            return a, g

        def measure(examples, *bases):
            self.examples.append(len(examples))
            Examples.pair = self.pair  # what it needs itself is not for factors
            D = self.measure(examples, *bases)
            Examples.pair = pair
            return D

        Examples.pair, Examples.corrected_eigenvalues = pair, measure
        return self

    def __exit__(self, *_):
        Examples.pair, Examples.corrected_eigenvalues = self.pair, self.measure


def trained(method, steps, part, **options):
    """A run over all ranks; what came out, and what each layer's statistics were taken from."""
    model = network()
    wrapped = DistributedDataParallel(model)
    optimizer = METHODS[method](wrapped, 0.05, damping=0.1, **options)
    refreshed = []
    with Watched() as watched:
        for x, y in stream(steps):
            optimizer.zero_grad()
            functional.cross_entropy(wrapped(x[part]), y[part]).backward()
            step = optimizer.steps
            optimizer.step()
            refreshed.append([c.basis_step == step for c in optimizer.curvatures.values()])
    seen = {"rows": watched.rows, "examples": watched.examples, "refreshed": refreshed}
    return result(model, optimizer) | seen


def main(rank, folder):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting_point", rank=rank, world_size=2
    )
    results = {}
    for method in METHODS:
        for name, options in DRAWN.items():
            results[method, name] = trained(method, STEPS, half_of(rank), **PERIODS, **options)
    for n in SCALE_EXAMPLES:
        results["examples", n] = trained("TEKFAC", 1, half_of(rank), scale_examples=n)
    torch.save(results, f"{folder}/rank{rank}.pt")
    distributed.destroy_process_group()
