"""If this fails, two processes with half the batch each are not one process with all of it."""

import pytest
import torch
from torch import distributed, multiprocessing

from . import two_processes
from .training import assert_same_bits, differences
from .two_processes import FISHERS, LAYERS, METHODS, half_of, network, optimizer_for, result, run

pytestmark = [
    pytest.mark.skipif(
        not (distributed.is_available() and distributed.is_gloo_available()), reason="no gloo"
    ),
    pytest.mark.usefixtures("one_thread"),  # as the ranks have
]
every_method = pytest.mark.parametrize("method", METHODS)
every_fisher = pytest.mark.parametrize("fisher", FISHERS)
REFRESHES = 2  # steps 0 and 2 of four, with eigen_interval 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two ranks left, for all tests of this file: one spawn."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    multiprocessing.spawn(two_processes.main, (folder,), nprocs=2)
    return [torch.load(f"{folder}/rank{rank}.pt", weights_only=True) for rank in range(2)]


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
    halves = ranks[0][method, fisher]
    start = network().state_dict()
    assert all(not torch.equal(whole["model"][name], start[name]) for name in start)
    assert_close(halves["model"], whole["model"])
    for name, curvature in whole["curvatures"].items():
        # bases may differ in sign; factors, D's trace and the parameters may not
        ours = halves["curvatures"][name]
        assert_close(ours["factors"], curvature["factors"])
        trace = curvature["eigenvalues"].sum()
        assert torch.allclose(ours["eigenvalues"].sum(), trace, rtol=1e-10, atol=0)


@every_fisher
@every_method
def test_the_ranks_end_with_the_same_bits(ranks, method, fisher):
    one, other = (dict(rank[method, fisher]) for rank in ranks)
    one.pop("decompositions"), other.pop("decompositions")
    assert_same_bits(one, other)


@every_fisher
@every_method
def test_each_layer_is_decomposed_by_one_rank_only_and_both_have_work(ranks, method, fisher):
    counts = [rank[method, fisher]["decompositions"] for rank in ranks]
    assert sum(counts) == REFRESHES * LAYERS * 2  # two factors each
    assert min(counts) > 0


@every_method
def test_without_a_group_nobody_talks(ranks, method):
    """Each rank is then a process by itself, with statistics of its own half."""
    for rank, results in enumerate(ranks):
        alone = dict(results[method, "alone"])
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
