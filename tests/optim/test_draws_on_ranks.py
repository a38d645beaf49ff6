"""If this fails, ranks that draw positions and examples, or take turns, drift apart."""

from itertools import combinations, product
from math import ceil

import numpy as np
import pytest

from . import two_processes_drawing
from .oracles import cross_entropy, objectives_empirical, per_example_gradients, second_moments
from .scenarios.ranks import needs_gloo, on_two_ranks
from .training import assert_same_bits, every_method
from .two_processes import network
from .two_processes_drawing import DRAWN, EXAMPLES, N, half_of, stream

pytestmark = needs_gloo


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two ranks left, for all tests of this file: one spawn."""
    return on_two_ranks(two_processes_drawing.play, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("options", DRAWN)
@every_method
def test_the_ranks_end_with_the_same_bits(ranks, method, options):
    assert_same_bits(*(rank[method.__name__, options] for rank in ranks))


@every_method
def test_ranks_take_turns_together_one_layer_at_a_time(ranks, method):
    for rank in ranks:
        first, *later = rank[method.__name__, "turns"]["refreshed"]
        assert first == [True] * 3
        assert all(sum(step) <= 1 for step in later)
        assert [sum(layer) for layer in zip(*later[:4], strict=True)] == [1, 1, 1]


@every_method
def test_each_rank_has_half_of_the_rows(ranks, method):
    """Of 0.7 · 10 wanted 3.5 each: one position of 4 examples; for all 7 it would take three."""
    for rank in ranks:
        rows = rank[method.__name__, "rows"]["rows"]
        assert set(rows) == {N // 2}
        assert len(rows) == 4  # steps 0, 2, 4, 6


@pytest.mark.parametrize("n", EXAMPLES)
def test_each_rank_measures_half_of_the_examples(ranks, n):
    for rank in ranks:
        assert rank["examples", n]["examples"] == [min(ceil(n / 2), N // 2)] * 3


def subset_of_each_half(n):
    return product(*(combinations(range(N)[half_of(rank)], n // 2) for rank in range(2)))


@pytest.mark.parametrize("n", [4, N])
def test_the_eigenvalues_are_those_of_examples_of_both_halves(ranks, n):
    """Whichever were drawn: for one choice of n/2 of each rank the oracle has the same D."""
    ((x, y),) = stream(1)
    for index, name in ((0, "0"), (3, "3"), (5, "5")):
        model = network()
        objectives = objectives_empirical(cross_entropy)
        G = per_example_gradients(model, model[index], objectives, (x, y))
        curvature = ranks[0]["examples", n]["curvatures"][name]
        Q_in, Q_out = (curvature["basis"][key].numpy() for key in ("Q_in", "Q_out"))
        D = curvature["eigenvalues"]["D"].numpy()
        equal = [
            np.allclose(
                second_moments(G[:, list(one + other)], Q_in, Q_out), D, rtol=1e-9, atol=1e-12
            )
            for one, other in subset_of_each_half(n)
        ]
        assert sum(equal) == 1
