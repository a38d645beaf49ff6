"""If this fails, eigenvalues from drawn examples are, on average, those of something else."""

from itertools import combinations, product
from math import comb

import numpy as np
import pytest
import torch

from tekfac_edu.optim import EKFAC, TEKFAC, Cost
from tekfac_edu.optim import batch as layer_batch
from tekfac_edu.optim.basis import Basis

from .networks import NETWORKS, chosen, orthogonal
from .one_step import (
    CORRECTED,
    OBJECTIVES,
    after_one_step,
    captured,
    corrected,
    gradients,
    numbers,
    run,
)
from .oracles import assert_close, by_group, second_moments
from .training import assert_same_bits, differences, every_method
from .truncated_training import completed, with_mean

# T = 1; projected first; no patches, with a bias, without, and frozen; calls of unequal positions
CHOSEN = chosen(
    "Linear",
    "Linear, positions",
    "Conv1d, plain",
    "Conv2d, plain",
    "Conv2d, no bias",
    "Conv2d, frozen bias",
    "Conv2d, everything differs by axis",
    "Conv2d, used on two sizes of picture",
    "Linear, used on a sequence and on its mean",
    "Conv2d, two groups",
    "Conv2d, two groups, one position",
    "Conv2d, two groups, used on two sizes of picture",
)
LINEAR = CHOSEN[0]
every_case = pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.name)
every_fisher = pytest.mark.parametrize("fisher", OBJECTIVES)


def measured(module, G, basis):
    """D of some examples' gradients in a basis, which may be truncated."""

    def one(G, Q_in, Q_out):
        k = Q_in.shape[1]
        return with_mean(second_moments(G, completed(Q_in), Q_out), k)

    return by_group(module, one, G, *(Q.numpy() for Q in basis))


def subsets_that_explain(module, curvature, G, subsets):
    """Those whose second moments in the curvature's basis are its eigenvalues."""
    found = []
    for subset in subsets:
        expected = measured(module, G[..., list(subset), :, :], curvature.basis)
        if np.abs(curvature.eigenvalues.D.numpy() - expected).max() <= 1e-10 * expected.max():
            found.append(subset)
    return found


@every_case
@every_fisher
@pytest.mark.parametrize("input_rank", [None, 2])
@corrected
def test_a_step_measures_so_many_examples_of_the_batch_each_with_its_own_gradient(
    case, fisher, method, input_rank
):
    N, n = 6, 2
    cost = Cost(eigenvalue_examples=n, input_rank=input_rank)
    _, module, curvature = after_one_step(case, method, fisher, N, cost=cost)
    G, subsets = gradients(case, fisher, N), combinations(range(N), n)
    assert len(subsets_that_explain(module, curvature, G, subsets)) == 1


PARTS = [((4, 4), 4), ((2, 6), 4), ((2, 2, 2), 3)]


def consecutive(sizes):
    ends = np.cumsum(sizes).tolist()
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


@pytest.mark.filterwarnings("ignore:.*not the mean of its examples")  # of the mean of means
@every_fisher
@corrected
@pytest.mark.parametrize(
    "case",
    chosen("Linear", "Conv2d, plain", "Conv2d, two groups"),
    ids=lambda case: case.name,
)
@pytest.mark.parametrize(("sizes", "n"), PARTS, ids=str)
def test_every_part_of_an_accumulated_batch_gives_its_share(case, method, fisher, sizes, n):
    N, parts = sum(sizes), consecutive(sizes)
    subsets = [
        combinations(range(part.start, part.stop), size * n // N)
        for part, size in zip(parts, sizes, strict=True)
    ]
    cost = Cost(eigenvalue_examples=n)
    _, module, curvature = after_one_step(case, method, fisher, N, parts, cost=cost)
    together = [sum(few, ()) for few in product(*subsets)]
    assert {len(few) for few in together} == {n}
    G = gradients(case, fisher, N)
    assert len(subsets_that_explain(module, curvature, G, together)) == 1


@pytest.mark.filterwarnings("ignore:.*not the mean of its examples")
def test_parts_whose_share_is_not_whole_still_count_by_all_their_examples():
    cost = Cost(eigenvalue_examples=2)
    parts = [slice(0, 3), slice(3, 8)]
    _, _, curvature = after_one_step(LINEAR, EKFAC, "empirical", 8, parts, cost=cost)
    G, basis = gradients(LINEAR, "empirical", 8), [Q.numpy() for Q in curvature.basis]
    possible = [
        [
            (part.stop - part.start) / 8 * second_moments(G[:, list(subset)], *basis)
            for n in (1, 2)
            for subset in combinations(range(part.start, part.stop), n)
        ]
        for part in parts
    ]
    D = curvature.eigenvalues.D.numpy()
    assert any(np.allclose(x + y, D, rtol=1e-9, atol=0) for x, y in product(*possible))


@pytest.mark.parametrize("sizes", [(3, 5), (1, 7), (2, 2, 9)], ids=str)
def test_unequal_parts_give_together_as_many_as_asked_and_each_gives_some(sizes):
    batch = captured(LINEAR, N=sum(sizes), parts=consecutive(sizes))
    for n in range(1, sum(sizes) + 1):
        draw = torch.Generator().manual_seed(n)
        counts = [len(few) for few in batch.chunks(examples=n, generator=draw)]
        assert n <= sum(counts) < n + len(sizes)
        assert all(1 <= count <= size for count, size in zip(counts, sizes, strict=True))


@every_case
@every_fisher
def test_the_mean_over_all_subsets_is_the_exact_second_moment(case, fisher):
    """Every subset turns up with the oracle's D, in any basis; the mean is all examples'."""
    N, n = 5, 2
    G, batch = gradients(case, fisher, N), captured(case, fisher, N)
    *blocks, _, _, d_out, d_in = G.shape
    basis = Basis(orthogonal(*blocks, d_in, seed=3), orthogonal(*blocks, d_out, seed=4))
    found = {}
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        batch.wholes[0].drawn.clear()  # what a step has drawn it keeps
        (few,) = batch.chunks(examples=n, generator=generator)
        assert len(few) == len(set(few.chosen.tolist())) == n
        assert few.weight == N
        subset = tuple(sorted(few.chosen.tolist()))
        if subset not in found:
            found[subset] = few.statistic(basis.corrected_eigenvalues, *basis).numpy()
            expected = measured(batch.layer.module, G[..., list(subset), :, :], basis)
            assert_close(found[subset], expected)
    assert len(found) == comb(N, n)
    exact = measured(batch.layer.module, G, basis)
    assert_close(np.mean(list(found.values()), 0), exact, rtol=1e-12)


@every_case
@corrected
def test_factors_are_still_those_of_all_examples(case, method):
    one, all_of_them = (
        after_one_step(case, method, N=6, cost=Cost(eigenvalue_examples=n))[2] for n in (2, None)
    )
    assert all(map(torch.equal, one.factors, all_of_them.factors))


@every_case
@every_fisher
def test_memory_for_one_example_at_a_time_gives_the_same(case, fisher, monkeypatch):
    cost = Cost(eigenvalue_examples=3, factor_rows=0.7)
    roomy = after_one_step(case, TEKFAC, fisher, 6, cost=cost)[2]
    monkeypatch.setattr(layer_batch, "CHUNK", 1)
    cramped = after_one_step(case, TEKFAC, fisher, 6, cost=cost)[2]
    for ours, theirs in zip(cramped.factors, roomy.factors, strict=True):
        assert_close(ours, theirs)
    # few examples leave bases that are not unique; the trace of D is the same in all of them
    assert_close(cramped.trace, roomy.trace)


@pytest.mark.parametrize("network", NETWORKS)
@every_method
def test_as_many_examples_as_there_are_or_more_change_no_bit_and_fewer_do(method, network):
    """Of corrected methods; the others measure nothing."""
    exact = numbers(*run(method, network))
    for n in (12, 13, 10**9):
        cost = Cost(eigenvalue_examples=n)
        assert_same_bits(numbers(*run(method, network, cost=cost)), exact)
    few = numbers(*run(method, network, cost=Cost(eigenvalue_examples=3)))
    assert bool(differences(few, exact)) == (method in CORRECTED)
