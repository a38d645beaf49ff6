"""If this fails, factors from a grid of positions are, on average, those of something else."""

import re
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch

from tekfac_edu import optim
from tekfac_edu.optim.capture import Capture
from tekfac_edu.optim.factors import kfac_factors, trace_restricted_factors

from .networks import CASES, batches, cnn, mlp
from .oracles import (
    assert_close,
    cross_entropy,
    factors_of_independence,
    layer_rows,
    objectives_categorical,
    objectives_empirical,
    trace_restricted_numerators,
)
from .training import UNEVEN, assert_same_bits, every_method, everything, train

N = 7
EMPIRICAL = objectives_empirical(cross_entropy)
ESTIMATES = {"KFAC": kfac_factors, "TKFAC": trace_restricted_factors}
every_estimate = pytest.mark.parametrize("estimate", ESTIMATES)
ONE_POSITION = {
    "Linear",
    "Linear, no bias",
    "Linear, in-place ReLU after it",
    "Linear, frozen bias",
}
# The calls of one layer have grids of their own; see the last tests.
ONE_CALL = [case for case in CASES if "used" not in case.name and "calls" not in case.name]
WITH_POSITIONS = [
    case for case in ONE_CALL if case.name not in ONE_POSITION and "in the middle" not in case.name
]
every_case = pytest.mark.parametrize("case", WITH_POSITIONS, ids=lambda case: case.name)


@cache
def oracle_rows(case):
    model = case.make()
    return layer_rows(model, model.layer, EMPIRICAL, case.batch(N))


def captured(case, name="layer", parts=(slice(None),), seed=1):
    """A layer's `LayerBatch` after one backward pass per part, and whether it has a bias."""
    model, (x, y) = case.make(), case.batch(N, seed)
    module = model.get_submodule(name)
    capture = Capture([module], True)
    for part in parts:
        (cross_entropy(model, x[part], y[part]) / len(parts)).backward()
    has_bias = module.bias is not None and module.bias.requires_grad
    return capture.batches()[module], has_bias


def by_grid(batch, has_bias, rows, estimate, draws=2000):
    """Factors for every grid that can be drawn: a dict (steps, offsets) per use -> fields."""
    found, expected = {}, None
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        (examples,) = batch.chunks(has_bias, rows=rows, generator=generator)
        key = tuple(grid and (grid.steps, grid.offsets) for grid in examples.grids)
        if key not in found:
            found[key] = vars(estimate(*examples.pair()))
        expected = np.prod([grid.share if grid else 1 for grid in examples.grids])
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


def oracle_fields(method, a, g, share=1):
    """The fields of a method's factors, each position standing for so many."""
    if method in ("KFAC", "EKFAC"):
        A, G = factors_of_independence(a, g)
        return {"A": share * A, "G": G}
    delta, left, right = trace_restricted_numerators(a, g)
    return {"delta": share * delta, "delta_Phi": share * left, "delta_Psi": share * right}


def oracle_of_grid(estimate, case, steps, offsets):
    """The factors of a grid, from the rows of the oracle at its positions."""
    a, g = oracle_rows(case)
    height, width = shape_of_positions(case)
    at = [
        i * width + j
        for i, j in product(range(height), range(width))
        if i % steps[0] == offsets[0] and j % steps[1] == offsets[1]
    ]
    return oracle_fields(estimate, a[:, at], g[:, :, at], height * width / len(at))


def assert_fields(found, expected, rtol=1e-10):
    assert found.keys() == expected.keys()
    for name in expected:
        assert_close(found[name], expected[name], rtol)


@every_case
@every_estimate
def test_the_factors_of_a_grid_are_those_of_its_positions_counted_share_times(case, estimate):
    batch, has_bias = captured(case)
    for rows in wanted_rows(case):
        for ((steps, offsets),), fields in by_grid(
            batch, has_bias, rows, ESTIMATES[estimate]
        ).items():
            assert_fields(fields, oracle_of_grid(estimate, case, steps, offsets))


@every_case
@every_estimate
def test_the_mean_over_all_offsets_is_the_exact_factors(case, estimate):
    a, g = oracle_rows(case)
    exact = oracle_fields(estimate, a, g)
    batch, has_bias = captured(case)
    for rows in wanted_rows(case):
        found = by_grid(batch, has_bias, rows, ESTIMATES[estimate])
        assert len(found) > 1
        mean = {
            name: np.mean([fields[name].numpy() for fields in found.values()], 0) for name in exact
        }
        assert_fields(mean, exact, rtol=1e-12)


@pytest.mark.parametrize("case", ONE_CALL, ids=lambda case: case.name)
def test_rows_are_as_many_as_asked_or_all_there_are(case):
    batch, has_bias = captured(case)
    (everything_there,) = batch.chunks(has_bias)
    T = everything_there.sizes[0]
    for rows in [0.5, *range(1, N * T + N, 3), 1e9]:
        (examples,) = batch.chunks(has_bias, rows=rows, generator=torch.Generator().manual_seed(1))
        a, g = examples.pair()
        assert g.shape[1:3] == a.shape[:2]
        assert len(a) == N
        assert a.shape[:2].numel() >= min(rows, N * T)
        if rows > N * T / 2 or T == 1:
            assert torch.equal(a, everything_there.pair()[0])
            assert torch.equal(g, everything_there.pair()[1])


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("method", ["KFAC", "EKFAC", "TKFAC", "TEKFAC"])
@pytest.mark.parametrize("name", ["Conv2d, strided", "Conv1d, plain", "Linear, positions"])
def test_a_step_takes_the_factors_of_one_grid_of_at_least_so_many_rows_per_input(
    name, method, fisher
):
    """The one among the oracle's that is equal; with one vector per class under "exact"."""
    (case,) = [case for case in CASES if case.name == name]
    pristine, model = case.make(), case.make()
    objectives = EMPIRICAL if fisher == "empirical" else objectives_categorical
    a, g = layer_rows(pristine, pristine.layer, objectives, case.batch(N))
    height, width = shape_of_positions(case)
    factor_rows = 0.9 * N * most_of(height * width) / a.shape[2]
    settings = dict(factor_interval=1, eigen_interval=1, scale_interval=1, fisher=fisher)
    optimizer = getattr(optim, method)(
        model, 0.01, process_group=None, factor_rows=factor_rows, **settings
    )
    outputs = model(case.batch(N)[0])
    if fisher != "empirical":
        optimizer.accumulate_fisher(outputs)
    torch.nn.functional.cross_entropy(outputs, case.batch(N)[1]).backward()
    optimizer.step()
    (layer,) = [layer for layer in optimizer.layers if layer.module is model.layer]
    found = vars(optimizer.curvatures[layer].factors)

    def equal(at, share):
        expected = oracle_fields(method, a[:, at], g[:, :, at], share)
        return all(np.allclose(found[k].numpy(), expected[k], rtol=1e-9) for k in expected)

    places = list(product(range(height), range(width)))
    equals = []
    for down, right in product(range(1, height + 1), range(1, width + 1)):
        if height % down or width % right or down * right == 1:
            continue
        for i, j in product(range(down), range(right)):
            at = [k for k, (y, x) in enumerate(places) if y % down == i and x % right == j]
            if equal(at, down * right):
                equals.append(len(at))
    assert len(equals) == 1
    assert N * equals[0] >= factor_rows * a.shape[2]


SHAPES = {"convolutions": (cnn, (1, 6, 6)), "dense": (mlp, (4,))}
every_network = pytest.mark.parametrize("network", SHAPES)


def trained(method, network, **options):
    make, shape = SHAPES[network]
    model = make()
    optimizer = method(model, 0.05, damping=0.1, **UNEVEN, **options)
    train(model, optimizer, batches(shape, 4))
    return everything(model, optimizer)


@every_network
@every_method
def test_more_rows_than_there_are_change_no_bit(method, network):
    assert_same_bits(trained(method, network, factor_rows=1e9), trained(method, network))


@every_method
def test_layers_with_one_position_are_never_touched(method):
    assert_same_bits(trained(method, "dense", factor_rows=1e-3), trained(method, "dense"))


@every_method
def test_few_rows_do_change_convolutions(method):
    with_few, exact = (
        trained(method, "convolutions", factor_rows=1),
        trained(method, "convolutions"),
    )
    with pytest.raises(AssertionError):
        assert_same_bits(with_few, exact)


@every_estimate
def test_every_part_of_an_accumulated_batch_has_its_own_grid_and_counts_by_its_examples(estimate):
    """Mean over all pairs of offsets, weighted by examples as `Refresh` weighs chunks: exact."""
    (case,) = [case for case in CASES if case.name == "Conv2d, strided"]
    parts = [slice(0, 3), slice(3, N)]
    batch, has_bias = captured(case, parts=parts)
    a, g = oracle_rows(case)
    exact = oracle_fields(estimate, a, g)
    # gradients of a mean of means of unequal parts: examples of part p count N_p·2/N instead of 1
    sums, seen = [{}, {}], [{}, {}]
    for seed in range(200):
        draw = torch.Generator().manual_seed(seed)
        for p, examples in enumerate(batch.chunks(has_bias, rows=14, generator=draw)):
            (grid,) = examples.grids
            seen[p][grid.offsets] = (len(examples), vars(ESTIMATES[estimate](*examples.pair())))
    for p in range(2):
        assert len(seen[p]) == grid.share > 1
        for n, fields in seen[p].values():
            for name, value in fields.items():
                sums[p][name] = sums[p].get(name, 0) + n / N * value / grid.share
    assert_fields({k: sums[0][k] + sums[1][k] for k in exact}, exact, rtol=1e-12)


SEVERAL_CALLS = [
    case for case in CASES if "used on" in case.name
]  # on inputs with unequal numbers of positions


@pytest.mark.parametrize("case", SEVERAL_CALLS, ids=lambda case: case.name)
@pytest.mark.parametrize("estimate", ["KFAC", "TKFAC"])
def test_calls_with_unequal_positions_are_unbiased_too(case, estimate):
    a, g = oracle_rows(case)
    T = a.shape[1]
    batch, has_bias = captured(case)
    exact = oracle_fields(estimate, a, g)
    for rows in (N * T / 2, N * T / 3):
        found = by_grid(batch, has_bias, rows, ESTIMATES[estimate])
        mean = {
            name: np.mean([fields[name].numpy() for fields in found.values()], 0) for name in exact
        }
        assert_fields(mean, exact, rtol=1e-12)


def test_calls_with_unequal_positions_have_the_rows_asked_for_together():
    (case,) = [case for case in CASES if case.name == "Conv2d, used on two sizes of picture"]
    batch, has_bias = captured(case)
    (everything_there,) = batch.chunks(has_bias)
    T = everything_there.sizes[0]
    for rows in range(1, N * T + 1):
        (examples,) = batch.chunks(has_bias, rows=rows, generator=torch.Generator().manual_seed(1))
        assert examples.pair()[0].shape[:2].numel() >= rows


@pytest.mark.parametrize("value", [0, 0.0, -1, "x", True, float("inf"), [4]])
def test_what_is_no_number_of_rows_is_refused_by_name(value):
    with pytest.raises(ValueError, match=rf"\bfactor_rows\b.*{re.escape(repr(value))}"):
        optim.TEKFAC(mlp(), 0.1, factor_rows=value)
