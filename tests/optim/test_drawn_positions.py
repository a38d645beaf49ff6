"""If this fails, factors from a grid of positions are, on average, those of something else."""

from itertools import product

import numpy as np
import pytest
import torch

from tekfac_edu.optim import KFAC, TKFAC, Cost

from .networks import CASES, NETWORKS, chosen
from .one_step import after_one_step, captured, numbers, rows, run
from .oracles import (
    assert_close,
    by_group,
    factors_of_independence,
    trace_restricted_numerators,
)
from .training import assert_same_bits, differences, every_method

N = 7
every_formula = pytest.mark.parametrize("method", [KFAC, TKFAC], ids=lambda m: m.__name__)
# The calls of one layer have grids of their own; see the last tests.
ONE_CALL = [case for case in CASES if "used" not in case.name and "calls" not in case.name]
WITH_POSITIONS = [
    case for case in ONE_CALL if len(case.layers) == 2 and rows(case)[0].shape[-2] > 1
]
every_case = pytest.mark.parametrize("case", WITH_POSITIONS, ids=lambda case: case.name)
SEVERAL_CALLS = [case for case in CASES if "used on" in case.name]  # of unequal positions
STRIDED, TWO_SIZES, TWICE = chosen(
    "Conv2d, strided", "Conv2d, used on two sizes of picture", "Conv2d, two groups, used twice"
)


def by_grid(batch, wanted, method, draws=2000):
    """Factors for every grid that can be drawn: a dict (steps, offsets) per use -> fields."""
    found, expected = {}, None
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        (chunk,) = batch.chunks(rows=wanted, generator=generator)
        key = tuple(grid and (grid.steps, grid.offsets) for grid in chunk.grids)
        if key not in found:
            found[key] = batch.layer.each_block(method.factors)(*chunk.rows())
        expected = np.prod([grid.share if grid else 1 for grid in chunk.grids])
        if len(found) == expected:
            return found
    raise AssertionError(f"{len(found)} of {expected} grids after {draws} draws")


def shape_of_positions(case):
    model, (x, _) = case.make(), case.batch(1)
    shapes = []
    model.layer.register_forward_hook(lambda m, args, output: shapes.append(output.shape))
    model(x)
    (shape,) = shapes
    if isinstance(model.layer, torch.nn.Linear):
        return 1, int(np.prod(shape[1:-1]))
    return (1, *shape[2:]) if len(shape) == 3 else (*shape[2:],)


def most_of(T):
    """The most of T positions that a grid which leaves some out can have, in one row."""
    return T // next(p for p in range(2, T + 1) if T % p == 0)


def wanted_rows(case):
    """For the finest and the coarsest grid that leaves positions out, and one between."""
    T = int(np.prod(shape_of_positions(case)))
    return sorted({1.0, N * T / 4, float(N * most_of(T))})


def oracle_fields(module, method, a, g, share=1):
    """The fields of a method's factors, each position standing for so many."""

    def of_one_group(a, g):
        if method.__name__ in ("KFAC", "EKFAC"):
            A, G = factors_of_independence(a, g)
            return share * A, G
        return tuple(share * field for field in trace_restricted_numerators(a, g))

    return by_group(module, of_one_group, a, g)


def oracle_of_grid(module, method, case, steps, offsets):
    """The factors of a grid, from the rows of the oracle at its positions."""
    a, g = rows(case)
    height, width = shape_of_positions(case)
    at = [
        i * width + j
        for i, j in product(range(height), range(width))
        if i % steps[0] == offsets[0] and j % steps[1] == offsets[1]
    ]
    share = height * width / len(at)
    return oracle_fields(module, method, a[..., at, :], g[..., at, :], share)


def assert_fields(found, expected, rtol=1e-10):
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, rtol)


def mean_of(found):
    """Field by field."""
    return [
        np.mean([field.numpy() for field in fields], 0)
        for fields in zip(*found.values(), strict=True)
    ]


@every_case
@every_formula
def test_factors_of_a_grid_are_those_of_its_positions_and_their_mean_is_exact(case, method):
    """Each position counted share times; the mean over all offsets."""
    batch = captured(case)
    module = batch.layer.module
    for wanted in wanted_rows(case):
        found = by_grid(batch, wanted, method)
        assert len(found) > 1
        for ((steps, offsets),), fields in found.items():
            assert_fields(fields, oracle_of_grid(module, method, case, steps, offsets))
        assert_fields(mean_of(found), oracle_fields(module, method, *rows(case)), rtol=1e-12)


@pytest.mark.parametrize("case", ONE_CALL, ids=lambda case: case.name)
def test_rows_are_as_many_as_asked_or_all_there_are(case):
    batch = captured(case)
    (everything_there,) = batch.chunks()
    T = everything_there.T
    for wanted in [0.5, *range(1, N * T + N, 3), 1e9]:
        (chunk,) = batch.chunks(rows=wanted, generator=torch.Generator().manual_seed(1))
        a, g = chunk.rows()
        assert a.shape[-3] == g.shape[-3] == N
        assert a.shape[-2] == g.shape[-2]
        assert N * a.shape[-2] >= min(wanted, N * T)
        if wanted > N * T / 2 or T == 1:
            assert all(map(torch.equal, (a, g), everything_there.rows()))


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize(
    "case",
    chosen("Conv2d, strided", "Conv1d, plain", "Linear, positions", "Conv2d, two groups"),
    ids=lambda case: case.name,
)
@every_method
def test_a_step_takes_the_factors_of_one_grid_of_at_least_so_many_rows_per_input(
    case, method, fisher
):
    """The one among the oracle's that is equal; with one vector per class under "exact"."""
    a, g = rows(case, fisher)
    height, width = shape_of_positions(case)
    factor_rows = 0.9 * N * most_of(height * width) / a.shape[-1]
    cost = Cost(factor_rows=factor_rows)
    _, module, curvature = after_one_step(case, method, fisher, cost=cost)
    places, equals = list(product(range(height), range(width))), []
    for down, right in product(range(1, height + 1), range(1, width + 1)):
        if height % down or width % right or down * right == 1:
            continue
        for i, j in product(range(down), range(right)):
            at = [k for k, (y, x) in enumerate(places) if y % down == i and x % right == j]
            grid = a[..., at, :], g[..., at, :]
            expected = oracle_fields(module, method, *grid, down * right)
            pairs = zip(curvature.factors, expected, strict=True)
            if all(np.allclose(ours.numpy(), theirs, rtol=1e-9) for ours, theirs in pairs):
                equals.append(len(at))
    assert len(equals) == 1
    assert N * equals[0] >= factor_rows * a.shape[-1]


@pytest.mark.parametrize("network", NETWORKS)
@every_method
def test_more_rows_than_there_are_change_no_bit_and_few_do_where_there_are_positions(
    method, network
):
    exact = numbers(*run(method, network))
    assert_same_bits(numbers(*run(method, network, cost=Cost(factor_rows=1e9))), exact)
    few = numbers(*run(method, network, cost=Cost(factor_rows=0.5)))
    assert bool(differences(few, exact)) == (network != "dense")


@every_formula
def test_every_part_of_an_accumulated_batch_has_its_own_grid_and_counts_by_its_examples(method):
    """Mean over all pairs of offsets, weighted by examples as `Refresh` weighs chunks: exact."""
    batch = captured(STRIDED, parts=[slice(0, 3), slice(3, N)])
    # gradients of a mean of means of unequal parts: examples of part p count N_p·2/N instead of 1
    seen = [{}, {}]
    for seed in range(200):
        draw = torch.Generator().manual_seed(seed)
        for part, chunk in enumerate(batch.chunks(rows=14, generator=draw)):
            (grid,) = chunk.grids
            fields = [len(chunk) / N * field for field in method.factors(*chunk.rows())]
            seen[part][grid.offsets] = fields
    assert all(len(found) == grid.share > 1 for found in seen)
    sums = [x + y for x, y in zip(*map(mean_of, seen), strict=True)]
    exact = oracle_fields(batch.layer.module, method, *rows(STRIDED))
    assert_fields(sums, exact, rtol=1e-12)


@every_formula
def test_calls_with_equal_positions_have_a_grid_each_and_share_the_rows_asked_for(method):
    """Of 2 · 16 positions a quarter: 4 of each call, on a grid of steps (2, 2)."""
    batch = captured(TWICE)
    found = by_grid(batch, N * 8, method)
    assert {grid[0] for grids in found for grid in grids} == {(2, 2)}
    assert len(found) == 16
    exact = oracle_fields(batch.layer.module, method, *rows(TWICE))
    assert_fields(mean_of(found), exact, rtol=1e-12)


@pytest.mark.parametrize("case", SEVERAL_CALLS, ids=lambda case: case.name)
@every_formula
def test_calls_with_unequal_positions_are_unbiased_too(case, method):
    a, g = rows(case)
    batch = captured(case)
    exact = oracle_fields(batch.layer.module, method, a, g)
    for share in (2, 3):
        found = by_grid(batch, N * a.shape[-2] / share, method)
        assert_fields(mean_of(found), exact, rtol=1e-12)


def test_calls_with_unequal_positions_have_the_rows_asked_for_together():
    batch = captured(TWO_SIZES)
    (everything_there,) = batch.chunks()
    for wanted in range(1, N * everything_there.T + 1):
        (chunk,) = batch.chunks(rows=wanted, generator=torch.Generator().manual_seed(1))
        assert N * chunk.rows()[0].shape[-2] >= wanted
