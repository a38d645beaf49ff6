"""If this fails, two processes with half the batch each are not one process with all of it."""

import pytest
import torch

from . import two_processes
from .scenarios.ranks import needs_gloo, on_two_ranks
from .training import assert_same_bits, differences, every_method
from .two_processes import FISHERS, LAYERS, half_of, network, optimizer_for, result, run

pytestmark = [needs_gloo, pytest.mark.usefixtures("one_thread")]  # as the ranks have
every_fisher = pytest.mark.parametrize("fisher", FISHERS)
REFRESHES = 2  # steps 0 and 2 of four, with bases at every second


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two ranks left, for all tests of this file: one spawn."""
    return on_two_ranks(two_processes.play, tmp_path_factory.mktemp("ranks"))


def by_one_process(method, fisher, part=slice(None)):
    model = network()
    optimizer = optimizer_for(model, method, fisher)
    run(model, optimizer, part)
    return result(model, optimizer)


def assert_close(one, other):
    """Equal to 1e-10 of their size; what differs in bits is compared by value."""
    for path in differences(one, other):
        x, y = (follow(state, path) for state in (one, other))
        assert torch.allclose(x, y, rtol=0, atol=1e-10 * y.abs().max().item()), path


def follow(state, path):
    for key in path.strip("/").split("/"):
        state = state[key]
    return state


@every_fisher
@every_method
def test_halves_of_the_batch_on_two_ranks_equal_the_whole_on_one(ranks, method, fisher):
    whole = by_one_process(method, fisher)
    halves = ranks[0][method.__name__, fisher]
    start = network().state_dict()
    assert all(not torch.equal(whole["model"][name], start[name]) for name in start)
    assert_close(halves["model"], whole["model"])
    for name, curvature in whole["curvatures"].items():
        # bases may differ in sign; factors, D's trace and the parameters may not
        ours = halves["curvatures"][name]
        assert_close(ours["factors"], curvature["factors"])
        for key, value in curvature["eigenvalues"].items():
            total = ours["eigenvalues"][key].sum()
            assert torch.allclose(total, value.sum(), rtol=1e-10, atol=0)


@every_fisher
@every_method
def test_the_ranks_end_with_the_same_bits(ranks, method, fisher):
    one, other = (dict(rank[method.__name__, fisher]) for rank in ranks)
    one.pop("decompositions"), other.pop("decompositions")
    assert_same_bits(one, other)


@every_fisher
@every_method
def test_each_layer_is_decomposed_by_one_rank_only_and_both_have_work(ranks, method, fisher):
    counts = [rank[method.__name__, fisher]["decompositions"] for rank in ranks]
    assert sum(counts) == REFRESHES * LAYERS * 2  # two factors each
    assert min(counts) > 0


@every_method
def test_without_a_group_nobody_talks(ranks, method):
    """Each rank is then a process by itself, with statistics of its own half."""
    for rank, results in enumerate(ranks):
        alone = dict(results[method.__name__, "alone"])
        assert alone.pop("messages") == 0
        assert_same_bits(alone, by_one_process(method, "empirical", half_of(rank)))


def test_a_nan_on_one_rank_is_skipped_by_both(ranks):
    for results in ranks:
        assert results["skipped"]["warnings"] == 1
        assert_same_bits(dict(results["skipped"]["after"]), dict(network().state_dict()))
        trained = {key: results["skipped"][key] for key in ("model", "curvatures")}
        undisturbed = dict(results["TEKFAC", "empirical"])
        undisturbed.pop("decompositions")
        assert_same_bits(trained, undisturbed)


def test_each_rank_of_a_group_draws_labels_of_its_own(ranks):
    """With the same labels on all, examples of different ranks would not be independent."""
    together, alone = ([rank["samples"][group] for rank in ranks] for group in ("default", "alone"))
    assert not torch.equal(*together)
    assert torch.equal(*alone)
    assert torch.equal(together[0], alone[0])
