"""If this fails, eigenvalues from drawn examples are, on average, those of something else."""

from functools import cache
from itertools import combinations, product
from math import comb

import numpy as np
import pytest
import torch

from tekfac_edu import optim
from tekfac_edu.optim import EKFAC, TEKFAC
from tekfac_edu.optim import batch as layer_batch
from tekfac_edu.optim.capture import Capture

from .networks import CASES, batches, cnn, mlp
from .oracles import (
    assert_close,
    cross_entropy,
    objectives_categorical,
    objectives_empirical,
    per_example_gradients,
    second_moments,
)
from .training import UNEVEN, assert_same_bits, every_method, everything, train

OBJECTIVES = {"empirical": objectives_empirical(cross_entropy), "exact": objectives_categorical}
EVERY_STEP = {"factor_interval": 1, "eigen_interval": 1, "scale_interval": 1}
# T = 1; projected first; no patches, with a bias, without, and frozen; calls of unequal positions
NAMES = [
    "Linear",
    "Linear, positions",
    "Conv1d, plain",
    "Conv2d, plain",
    "Conv2d, no bias",
    "Conv2d, frozen bias",
    "Conv2d, everything differs by axis",
    "Conv2d, used on two sizes of picture",
    "Linear, used on a sequence and on its mean",
]
CHOSEN = [case for name in NAMES for case in CASES if case.name == name]
assert len(CHOSEN) == len(NAMES)
every_case = pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.name)
every_fisher = pytest.mark.parametrize("fisher", OBJECTIVES)
corrected = pytest.mark.parametrize("method", ["EKFAC", "TEKFAC"])


@cache
def gradients(case, fisher, N):
    """(S, N, d_out, d_in) of `layer`, every example through the model by itself."""
    model = case.make()
    return per_example_gradients(model, model.layer, OBJECTIVES[fisher], case.batch(N))


def after_one_step(case, method, fisher, N, parts=None, **options):
    """The curvature of `layer`."""
    model, (x, y) = case.make(), case.batch(N)
    settings = {"fisher": fisher, "process_group": None, **EVERY_STEP}
    optimizer = getattr(optim, method)(model, 0.01, **settings, **options)
    parts = parts or [slice(0, N)]
    for part in parts:
        outputs = model(x[part])
        if fisher != "empirical":
            optimizer.accumulate_fisher(outputs)
        (torch.nn.functional.cross_entropy(outputs, y[part]) / len(parts)).backward()
    optimizer.step()
    (layer,) = [layer for layer in optimizer.layers if layer.module is model.layer]
    return optimizer.curvatures[layer]


def subsets_that_explain(curvature, G, subsets):
    """Those whose second moments in the curvature's basis are its eigenvalues."""
    Q_in, Q_out = curvature.Q_in.numpy(), curvature.Q_out.numpy()
    found = []
    for subset in subsets:
        expected = second_moments(G[:, list(subset)], Q_in, Q_out)
        if np.abs(curvature.eigenvalues.numpy() - expected).max() <= 1e-10 * expected.max():
            found.append(subset)
    return found


@every_case
@every_fisher
@corrected
def test_a_step_measures_so_many_examples_of_the_batch_each_with_its_own_gradient(
    case, fisher, method
):
    N, n = 6, 2
    curvature = after_one_step(case, method, fisher, N, scale_examples=n)
    subsets = combinations(range(N), n)
    assert len(subsets_that_explain(curvature, gradients(case, fisher, N), subsets)) == 1


@pytest.mark.filterwarnings("ignore:.*not the mean of its examples")  # of the mean of means
@every_fisher
@corrected
@pytest.mark.parametrize("name", ["Linear", "Conv2d, plain"])
@pytest.mark.parametrize(("sizes", "n"), [((4, 4), 4), ((2, 6), 4), ((2, 2, 2), 3)], ids=str)
def test_every_part_of_an_accumulated_batch_gives_its_share(name, method, fisher, sizes, n):
    (case,) = [case for case in CASES if case.name == name]
    N, start, parts, subsets = sum(sizes), 0, [], []
    for size in sizes:
        parts.append(slice(start, start + size))
        subsets.append(list(combinations(range(start, start + size), size * n // N)))
        start += size
    assert sum(len(of_part[0]) for of_part in subsets) == n
    curvature = after_one_step(case, method, fisher, N, parts, scale_examples=n)
    G = gradients(case, fisher, N)
    together = [sum(chosen, ()) for chosen in product(*subsets)]
    assert len(subsets_that_explain(curvature, G, together)) == 1


@pytest.mark.filterwarnings("ignore:.*not the mean of its examples")
def test_parts_whose_share_is_not_whole_still_count_by_all_their_examples():
    case = CASES[0]
    curvature = after_one_step(
        case, "EKFAC", "empirical", 8, [slice(0, 3), slice(3, 8)], scale_examples=2
    )
    G, Q_in, Q_out = gradients(case, "empirical", 8), curvature.Q_in, curvature.Q_out
    first, other = [], []
    for of, count, found in ((range(3), 3, first), (range(3, 8), 5, other)):
        for n in (1, 2):
            for subset in combinations(of, n):
                D = second_moments(G[:, list(subset)], Q_in.numpy(), Q_out.numpy())
                found.append(count / 8 * D)
    D = curvature.eigenvalues.numpy()
    assert any(np.allclose(x + y, D, rtol=1e-9, atol=0) for x, y in product(first, other))


@pytest.mark.parametrize("sizes", [(3, 5), (1, 7), (2, 2, 9)], ids=str)
def test_unequal_parts_give_together_as_many_as_asked_and_each_gives_some(sizes):
    case, start = CASES[0], 0
    model, (x, y) = case.make(), case.batch(sum(sizes))
    watching = Capture([model.layer], True)
    for size in sizes:
        part = slice(start, start + size)
        (cross_entropy(model, x[part], y[part]) / len(sizes)).backward()
        start += size
    batch = watching.batches()[model.layer]
    for n in range(1, sum(sizes) + 1):
        draw = torch.Generator().manual_seed(n)
        counts = [len(few) for few in batch.chunks(True, examples=n, generator=draw)]
        assert n <= sum(counts) < n + len(sizes)
        assert all(1 <= count <= size for count, size in zip(counts, sizes, strict=True))


def captured(case, fisher, N):
    """The `LayerBatch` of `layer`, and whether it has a bias."""
    model, (x, y) = case.make(), case.batch(N)
    watching = Capture([model.layer], fisher == "empirical")
    if fisher == "empirical":
        cross_entropy(model, x, y).backward()
    else:
        log_p = torch.log_softmax(model(x), 1)
        with watching.fisher_pass():
            for c in range(log_p.shape[1]):
                weight = log_p[:, c].detach().exp().sqrt()
                (-log_p[:, c] * weight).sum().backward(retain_graph=True)
    bias = model.layer.bias
    return watching.batches()[model.layer], bias is not None and bias.requires_grad


@every_case
@every_fisher
def test_the_mean_over_all_subsets_is_the_exact_second_moment(case, fisher):
    """Every subset turns up with the oracle's D, in any basis; the mean is all examples'."""
    N, n = 5, 2
    G = gradients(case, fisher, N)
    batch, has_bias = captured(case, fisher, N)
    draw = torch.Generator().manual_seed(3)
    Q_in, Q_out = (
        torch.linalg.qr(torch.randn(d, d, generator=draw, dtype=torch.float64))[0]
        for d in (G.shape[3], G.shape[2])
    )
    found = {}
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        (few,) = batch.chunks(has_bias, examples=n, generator=generator)
        assert len(few) == len(set(few.chosen.tolist())) == n
        subset = tuple(sorted(few.chosen.tolist()))
        if subset not in found:
            found[subset] = few.corrected_eigenvalues(Q_in, Q_out).numpy()
            expected = second_moments(G[:, list(subset)], Q_in.numpy(), Q_out.numpy())
            assert_close(found[subset], expected)
    assert len(found) == comb(N, n)
    exact = second_moments(G, Q_in.numpy(), Q_out.numpy())
    assert_close(np.mean(list(found.values()), 0), exact, rtol=1e-12)


def test_every_example_is_drawn_about_as_often_from_the_seeds_of_successive_steps():
    """800 draws of 2 of 8: each 200 ± 12.2 by the binomial; 5 standard deviations are allowed."""
    batch, has_bias = captured(CASES[0], "empirical", 8)
    counts = np.zeros(8)
    for seed in range(800):
        generator = torch.Generator().manual_seed(seed)
        (few,) = batch.chunks(has_bias, examples=2, generator=generator)
        counts[few.chosen.numpy()] += 1
    assert counts.sum() == 1600
    assert abs(counts - 200).max() < 61


@every_case
@corrected
def test_factors_are_still_those_of_all_examples(case, method):
    one, all_of_them = (
        after_one_step(case, method, "empirical", 6, **options)
        for options in ({"scale_examples": 2}, {})
    )
    for name, tensor in vars(all_of_them.factors).items():
        assert torch.equal(getattr(one.factors, name), tensor)


@every_case
@every_fisher
def test_memory_for_one_example_at_a_time_gives_the_same(case, fisher, monkeypatch):
    roomy = after_one_step(case, "TEKFAC", fisher, 6, scale_examples=3, factor_rows=0.7)
    monkeypatch.setattr(layer_batch, "CHUNK", 1)
    cramped = after_one_step(case, "TEKFAC", fisher, 6, scale_examples=3, factor_rows=0.7)
    for name, tensor in vars(roomy.factors).items():
        assert_close(getattr(cramped.factors, name), tensor)
    # few examples leave bases that are not unique; the trace of D is the same in all of them
    assert_close(cramped.eigenvalues.sum(), roomy.eigenvalues.sum())


SHAPES = {"convolutions": (cnn, (1, 6, 6)), "dense": (mlp, (4,))}


def trained(method, network, **options):
    make, shape = SHAPES[network]
    model = make()
    optimizer = method(model, 0.05, damping=0.1, **UNEVEN, **options)
    train(model, optimizer, batches(shape, 4, N=12))
    return everything(model, optimizer)


@pytest.mark.parametrize("n", [12, 13, 10**9])
@pytest.mark.parametrize("network", SHAPES)
@every_method
def test_as_many_examples_as_there_are_or_more_change_no_bit(method, network, n):
    assert_same_bits(trained(method, network, scale_examples=n), trained(method, network))


@pytest.mark.parametrize("network", SHAPES)
@every_method
def test_few_examples_change_corrected_methods_and_no_others(method, network):
    few, exact = trained(method, network, scale_examples=3), trained(method, network)
    if method not in (EKFAC, TEKFAC):
        assert_same_bits(few, exact)
        return
    with pytest.raises(AssertionError):
        assert_same_bits(few, exact)


@pytest.mark.parametrize("value", [0, -3, 1.5, True, "all", float("nan")])
def test_what_is_no_number_of_examples_is_refused_by_name(value):
    with pytest.raises(ValueError, match=rf"\bscale_examples\b.*{value!r}"):
        TEKFAC(mlp(), 0.1, scale_examples=value)
