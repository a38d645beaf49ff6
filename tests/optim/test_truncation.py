"""If this fails, a layer of many inputs has another preconditioner than `input_rank` says."""

from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tekfac_edu.optim import EKFAC, KFAC, TEKFAC, TKFAC, Added, Cost, Paper
from tekfac_edu.optim.basis import Basis
from tekfac_edu.optim.truncation import (
    TruncatedBasis,
    basis_of,
    first_leading_basis,
    leading_eigenbasis,
    moved,
)

from .dense_training import Settings, looped_rows
from .networks import (
    CLASSES,
    NETWORKS,
    batches,
    chosen,
    double_precision,
    gaussian,
    mlp,
    one_layer,
    orthogonal,
    separable,
)
from .one_step import (
    CORRECTED,
    OBJECTIVES,
    after_one_step,
    curvatures_of,
    every_basis,
    factors,
    gradients,
    rows,
)
from .oracles import (
    assert_close,
    by_group,
    cross_entropy,
    per_example_gradients,
    second_moments,
    vec,
)
from .scenarios.ranks import needs_gloo, on_two_ranks
from .scenarios.resuming import assert_resumes_from_any_step
from .training import (
    EVERY_STEP,
    METHODS,
    UNEVEN,
    all_finite,
    assert_same_bits,
    backward,
    every_method,
    everything,
    train,
)
from .truncated_training import (
    TruncatedLayer,
    TruncatedTraining,
    completed,
    dense,
    diagonal,
    shared_out,
    with_mean,
)

# T = 1; positions, formed first and projected first; several uses; groups of all these
CHOSEN = chosen(
    "Linear",
    "Linear, no bias",
    "Linear, frozen bias",
    "Linear, positions",
    "Conv1d, plain",
    "Conv2d, plain",
    "Conv2d, no bias",
    "Conv2d, everything differs by axis",
    "Linear, used twice",
    "Linear, used on a sequence and on its mean",
    "Conv2d, used on two sizes of picture",
    "Conv1d, depthwise",
    "Conv2d, two groups",
    "Conv2d, two groups, one position",
    "Conv2d, two groups, four positions, six outputs",
    "Conv2d, two groups, used twice",
    "Conv2d, two groups, used on two sizes of picture",
)
CHOSEN += [
    one_layer("Linear, two positions, five outputs", (2, 4), nn.Linear, 4, 5),
    one_layer("Conv2d, four positions, six outputs", (1, 4, 4), nn.Conv2d, 1, 6, 3),
]
every_case = pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.name)
every_fisher = pytest.mark.parametrize("fisher", OBJECTIVES)
by_qr = pytest.mark.parametrize("method", CORRECTED, ids=lambda method: method.__name__)
RANKS = (1, 3)  # of 4 inputs at least: three to share, and one or more
# a warning about a network that is all right is a fault too
pytestmark = [
    pytest.mark.filterwarnings("error::RuntimeWarning"),
    pytest.mark.usefixtures("one_thread"),
]


# the functions of truncation.py


def spread(*shape, seed=0):
    """A positive definite matrix (..., d, d); each eigenvalue 4 times the one before."""
    Q = orthogonal(*shape, seed=seed)
    return Q * 4.0 ** torch.arange(shape[-1]) @ Q.mT


def test_leading_eigenvectors_are_the_last_ones_and_the_others_eigenvalues_a_mean():
    S = spread(2, 6)
    s, Q = leading_eigenbasis(S, 2)
    for b in range(2):
        values, V = np.linalg.eigh(S[b].numpy())
        assert_close(s[b], [*values[-2:], values[:-2].mean()])
        assert_close(abs(V[:, -2:].T @ Q[b].numpy()), np.eye(2))


@pytest.mark.parametrize("shape", [(9,), (2, 9)], ids=["one", "blocks"])
def test_a_first_basis_without_eigh_is_near_the_leading_eigenvectors(shape):
    """One iteration from random columns leaves sines of 1/2, each further one about 1/4."""
    S = spread(*shape)
    Q = first_leading_basis(S, 4)
    for block in np.ndindex(*shape[:-1]):
        V = np.linalg.eigh(S[block].numpy())[1][:, -4:]
        one = Q[block].numpy()
        assert_close(one.T @ one, np.eye(4))
        assert np.linalg.norm(one - V @ (V.T @ one), 2) < 0.05
        assert_close(first_leading_basis(S[block], 4), one, rtol=1e-8)


def test_a_first_basis_is_the_same_every_time_and_draws_nothing_of_torch_s():
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        found.append(first_leading_basis(spread(9), 4))
        assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(*found)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shape", [(7, 1), (5, 2), (5, 8)], ids=str)
@pytest.mark.parametrize("S", [1, 3])
def test_the_last_column_has_the_mean_of_what_the_columns_do_not_explain(shape, S, k):
    a, g = gaussian(*shape, 5), gaussian(S, *shape, 3, seed=1)
    Q_in, Q_out = orthogonal(5, seed=2)[:, :k], orthogonal(3, seed=3)
    G = np.einsum("snto,nti->snoi", g.numpy(), a.numpy())
    expected = with_mean(second_moments(G, completed(Q_in.numpy()), Q_out.numpy()), k)
    formula = TruncatedBasis.corrected_eigenvalues
    assert_close(formula.of_rows(a, g, Q_in, Q_out), expected)
    assert_close(formula.of_gradients(torch.tensor(G), Q_in, Q_out), expected)


def test_what_rounding_leaves_is_not_below_zero():
    """Gradients in the span of the columns: the rest is a difference of equal sums."""
    Q_in, Q_out = orthogonal(40, seed=1)[:, :7].float(), orthogonal(9, seed=2).float()
    a, g = gaussian(30, 7).float() @ Q_in.T, gaussian(30, 9, seed=3).float()
    D = TruncatedBasis.corrected_eigenvalues.of_rows(a, g, Q_in, Q_out)
    assert D.min() >= 0
    assert D[:, -1].max() < 1e-5 * D.max()


def a_basis(k, seed, *blocks):
    """Of 5 inputs and 3 outputs; k columns, all if None."""
    Q_in, Q_out = orthogonal(*blocks, 5, seed=seed), orthogonal(*blocks, 3, seed=seed + 1)
    return basis_of(Q_in[..., :k], Q_out)


@pytest.mark.parametrize("k", [None, 1, 4])
def test_a_basis_knows_its_width_and_writes_D_out(k):
    basis = a_basis(k, 1, 2)
    assert type(basis) is (Basis if k is None else TruncatedBasis)
    assert basis.shape == ((2, 3, 5) if k is None else (2, 3, k + 1))
    D = gaussian(*basis.shape).square()
    whole = basis.whole(D)
    assert whole.shape == (2, 3, 5)
    if k is not None:
        assert basis.left_out == 5 - k
        for b in range(2):
            expected = np.hstack([D[b, :, :k], np.repeat(D[b, :, k:].numpy(), 5 - k, 1)])
            assert_close(whole[b], expected, rtol=1e-15)


@pytest.mark.parametrize("blocks", [(), (2,)], ids=["one", "blocks"])
@pytest.mark.parametrize("k", [None, 1, 4])
def test_a_truncated_basis_preconditions_by_the_whole_matrix(k, blocks):
    basis, M = a_basis(k, 1, *blocks), gaussian(*blocks, 3, 5, seed=7)
    D = gaussian(*basis.shape).square() + 0.1
    found = basis.precondition(M, *basis, D)
    for block in np.ndindex(*blocks):
        F = dense(*(t[block].numpy() for t in (*basis, D)))
        expected = np.linalg.solve(F, vec(M[block].numpy())).reshape(3, 5, order="F")
        assert_close(found[block], expected)


@pytest.mark.parametrize("blocks", [(), (2,)], ids=["one", "blocks"])
@pytest.mark.parametrize(("before", "after"), [*product([None, 1, 2, 4], repeat=2)])
def test_eigenvalues_move_into_a_basis_of_as_many_more_or_fewer_columns(before, after, blocks):
    old, new = a_basis(before, 1, *blocks), a_basis(after, 5, *blocks)
    D = gaussian(*old.shape).square()
    found = moved(D, old, new)
    assert found.shape == new.shape
    assert found.min() >= 0
    assert_close(new.whole(found).sum(), old.whole(D).sum().item(), rtol=1e-12)
    for block in np.ndindex(*blocks):
        F = dense(*(t[block].numpy() for t in (*old, D)))
        assert_close(found[block], diagonal(F, *(Q[block].numpy() for Q in new)))


# what a step makes of them


@every_case
@every_fisher
def test_bases_and_eigenvalues_are_those_of_the_oracle(case, fisher):
    """With eigh, the leading eigenvectors; in any basis, D of the whole one, the rest a mean."""

    def D_of(a, g, G, Q_in, Q_out):
        S_in, S_out, scale = factors(method, a, g)
        Q_in = completed(Q_in)
        if method in CORRECTED:
            return second_moments(G, Q_in, Q_out)
        return scale * np.outer(np.diag(Q_out.T @ S_out @ Q_out), np.diag(Q_in.T @ S_in @ Q_in))

    def explained(a, g, Q_in):
        V = np.linalg.eigh(factors(method, a, g)[0])[1][:, -Q_in.shape[1] :]
        return np.abs(V.T @ Q_in).max(0)

    (a, g), G = rows(case, fisher), gradients(case, fisher)
    ways = [*product(METHODS, ["eigh"]), *product(CORRECTED, ["qr"])]
    for (method, eigenbasis), k in product(ways, RANKS):
        cost = Cost(input_rank=k, eigenbasis=eigenbasis)
        _, module, curvature = after_one_step(case, method, fisher, cost=cost)
        Q_in, Q_out = (Q.numpy() for Q in curvature.basis)
        assert Q_in.shape == (*a.shape[:-3], a.shape[-1], k)
        D = by_group(module, D_of, a, g, G, Q_in, Q_out)
        assert_close(curvature.eigenvalues.D, by_group(module, partial(with_mean, k=k), D))
        assert_close(curvature.spectrum, by_group(module, partial(shared_out, k=k), D))
        assert_close(curvature.trace, D.sum())
        for Q in (Q_in, Q_out):
            ones = np.broadcast_to(np.eye(Q.shape[-1]), (*Q.shape[:-2], *[Q.shape[-1]] * 2))
            assert_close(Q.swapaxes(-1, -2) @ Q, ones)
        if eigenbasis == "eigh":
            assert_close(by_group(module, explained, a, g, Q_in), np.ones_like(Q_in[..., 0, :]))


@every_case
@pytest.mark.parametrize("rule", [Paper, Added])
def test_the_preconditioner_is_that_of_the_whole_matrix_with_the_rest_shared(case, rule):
    def expected(a, g, M):
        layer = truncated_layer(method, k, rule, a, g)
        return np.linalg.solve(layer.damped(0.03), vec(M)).reshape(M.shape, order="F")

    a, g = rows(case)
    for method, k in product(METHODS, RANKS):
        options = {"damping": rule(0.03), "cost": Cost(input_rank=k)}
        optimizer, module, curvature = after_one_step(case, method, **options)
        M = gaussian(*curvature.layer.shape) * torch.arange(1, a.shape[-1] + 1)
        found = optimizer.precondition(module, M)
        assert_close(found, by_group(module, expected, a, g, M.numpy()))


def truncated_layer(method, k, rule, a, g):
    layer = TruncatedLayer(method.__name__, Settings(rule=rule.__name__), k)
    layer.update(0, a, g)
    return layer


RUNS = {
    "mlp": ("dense", 2, {}),
    "mlp, uneven": ("dense", 2, {"interval": (2, 3, 1)}),
    "mlp, one layer of two": ("dense", 5, {"interval": (3, 1, 2)}),
    "cnn": ("convolutions", 4, {"interval": (1, 2, 1)}),
    "cnn, uneven": ("convolutions", 4, {"interval": (3, 1, 2)}),
    "cnn, damping added": ("convolutions", 4, {"rule": "Added", "interval": (1, 2, 1)}),
    "cnn, by trace": ("convolutions", 4, {"rule": "ByTrace", "lr": 0.3, "interval": (1, 2, 1)}),
    "cnn, warm-up": ("convolutions", 4, {"warmup": 2, "interval": (3, 2, 4)}),
}


@pytest.mark.parametrize("run", RUNS)
@every_method
def test_training_arrives_where_dense_algebra_does(method, run):
    """Five steps: bases turn under running averages, and D moves with them."""
    network, k, options = RUNS[run]
    make, shape = NETWORKS[network]
    start, ours, theirs = (examples_alone(make()) for _ in range(3))
    settings = {"lr": 1.0, "momentum": 0.8, "weight_decay": 0.3, "decay": 0.7}
    settings = Settings(**(settings | options))
    cost = Cost(input_rank=k)
    optimizer = method(ours, process_group=None, cost=cost, **settings.arguments())
    looped = looped_rows(OBJECTIVES["empirical"])
    oracle = TruncatedTraining(theirs, method.__name__, settings, cross_entropy, looped, k=k)
    for batch in batches(shape, 5):
        backward(ours, optimizer, *batch)
        optimizer.step()
        oracle.step(batch)
    for before, one, other in zip(*(m.parameters() for m in (start, ours, theirs)), strict=True):
        assert not torch.equal(one, before)
        assert_close(one - before, (other - before).detach().numpy())
    assert any(curvature.basis.shape[-1] == k + 1 for curvature in optimizer.curvatures.values())


def examples_alone(model):
    """Norms with fixed statistics: what an example sends back does not depend on the others."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def trained(method, network, steps=4, **options):
    """Model and optimizer, by the name of a network or what makes one of dense layers."""
    make, shape = NETWORKS.get(network, (network, (4,)))
    model = make()
    optimizer = method(model, 0.5, process_group=None, damping=0.1, **(UNEVEN | options))
    train(model, optimizer, batches(shape, steps))
    return model, optimizer


@pytest.mark.parametrize("options", [{}, {"stagger": True}], ids=str)
@pytest.mark.parametrize("network", NETWORKS)
@every_basis
def test_layers_of_no_more_inputs_are_as_without_to_the_last_bit(
    method, eigenbasis, network, options
):
    cost = Cost(eigenbasis=eigenbasis, **options)
    expected = everything(*trained(method, network, cost=cost))
    for k in (19, 10**9):
        found = everything(*trained(method, network, cost=replace(cost, input_rank=k)))
        found["optimizer"]["settings"]["cost"]["input_rank"] = None
        assert_same_bits(found, expected)


@pytest.mark.parametrize("fisher", OBJECTIVES)
@pytest.mark.parametrize(
    "case", [CHOSEN[0], CHOSEN[5], CHOSEN[12], *CHOSEN[-2:]], ids=lambda case: case.name
)
def test_parts_of_a_batch_and_memory_for_one_example_make_the_whole(case, fisher, monkeypatch):
    """Parts under "exact": the mean of unequal parts' means is not the batch's."""
    parts = [slice(0, 3), slice(3, 4), slice(4, 7)] if fisher == "exact" else None
    for method in METHODS:
        cost = Cost(input_rank=3)
        whole = after_one_step(case, method, fisher, cost=cost)[2]
        with monkeypatch.context() as patch:
            patch.setattr("tekfac_edu.optim.batch.CHUNK", 1)
            cramped = after_one_step(case, method, fisher, parts=parts, cost=cost)[2]
        assert_close(cramped.eigenvalues.D, whole.eigenvalues.D)


def test_the_table_is_of_all_eigenvalues_the_shared_ones_too():
    (case,) = chosen("Linear")
    for method in METHODS:
        options = {"damping": Added(1e-3), "cost": Cost(input_rank=2)}
        optimizer, _, _ = after_one_step(case, method, **options)
        D = np.linalg.eigvalsh(truncated_layer(method, 2, Added, *rows(case)).dense())
        row = optimizer.report().rows[0]
        assert (row.name, row.d_out, row.d_in) == ("layer", 5, 5)
        assert row.largest == pytest.approx(D[-1], rel=1e-9)
        assert row.smallest == pytest.approx(D[0], abs=1e-9 * D[-1])
        assert row.median == pytest.approx(D[(len(D) - 1) // 2], abs=1e-9 * D[-1])
        assert row.swamped == pytest.approx(np.mean(D < 1e-3))
        assert 0 < row.swamped < 1


DEGENERATE = {
    "one example": lambda x, y: (x[:1], y[:1]),
    "the same example": lambda x, y: (x[:1].repeat(4, 1), y[:1].repeat(4)),
    "nothing but zeros": lambda x, y: (0 * x, y),
    "two inputs of four": lambda x, y: (x * torch.tensor([1, 0, 1, 0]), y),
    "huge and tiny": lambda x, y: (x * torch.tensor([1e6, 1, 1e-3, 1e-6]), y),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", DEGENERATE)
@every_basis
def test_inputs_in_few_directions_leave_nothing_negative_and_nothing_infinite(
    method, eigenbasis, kind, dtype
):
    """A rest of zero, though it is a difference or a sum of rounded numbers, is not below it."""
    error = 1e-12 if dtype == torch.float64 else 1e-5
    model = chosen("Linear, no bias")[0].make().to(dtype)  # four inputs
    cost = Cost(input_rank=3, eigenbasis=eigenbasis)
    optimizer = method(model, 1.0, damping=1e-4, cost=cost, **EVERY_STEP)
    for x, y in batches((4,), 4):
        train(model, optimizer, [DEGENERATE[kind](x.to(dtype), y)])
        for layer, curvature in optimizer.curvatures.items():
            Q = curvature.basis.Q_in.double().numpy()
            assert Q.shape == (layer.d_in, 3)
            assert abs(Q.T @ Q - np.eye(3)).max() < error
            assert curvature.eigenvalues.D.min() >= 0
    assert all_finite(model, optimizer)


@by_qr
def test_under_qr_no_large_matrix_is_ever_decomposed(method, monkeypatch):
    sizes, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda S: sizes.append(S.shape[-1]) or eigh(S))
    model = double_precision(
        lambda: nn.Sequential(nn.Linear(9, 4, bias=False), nn.Tanh(), nn.Linear(4, CLASSES))
    )
    cost = Cost(input_rank=2, eigenbasis="qr")
    optimizer = method(model, 0.05, cost=cost, **EVERY_STEP)
    stream = list(batches((9,), 4))
    train(model, optimizer, stream[:1])
    assert sorted(sizes) == [3, 4]  # of the outputs; inputs are 9 and 5
    del sizes[:]
    train(model, optimizer, stream[1:])
    assert sizes == []


@pytest.mark.parametrize(("before", "after"), [(None, 2), (2, None), (1, 4), (4, 1)])
@every_basis
def test_another_rank_given_between_steps_takes_over_with_the_next_basis(
    method, eigenbasis, before, after
):
    """Until then the old one is measured in, and D keeps its trace."""
    model, optimizer = mlp(), None
    cost = Cost(eigenbasis=eigenbasis, input_rank=before)
    optimizer = method(model, 0.5, damping=0.1, cost=cost, interval=(1, 3, 1), warmup=0)
    stream = list(batches((4,), 5))
    train(model, optimizer, stream[:2])
    other = replace(cost, input_rank=after)
    optimizer.take(replace(optimizer.settings, cost=other))
    traces = {name: c.trace.item() for name, c in curvatures_of(optimizer).items()}
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, stream[2:3])
    for name, curvature in curvatures_of(optimizer).items():
        assert curvature.basis.Q_in.shape[1] == (before or curvature.layer.d_in)
        if method in CORRECTED:
            now = trace_of_batch(name, start, stream[2])
            assert_close(curvature.trace, 0.95 * traces[name] + 0.05 * now)
    held = {name: (*c.basis, c.eigenvalues.D) for name, c in curvatures_of(optimizer).items()}
    optimizer.take(replace(optimizer.settings, interval=(1, 3, 1000)))
    train(model, optimizer, stream[3:4])
    for name, curvature in curvatures_of(optimizer).items():
        assert curvature.basis.Q_in.shape[1] == (after or curvature.layer.d_in)
        if method in CORRECTED:
            F = dense(*(t.numpy() for t in held[name]))
            assert_close(
                curvature.eigenvalues.D, diagonal(F, *(Q.numpy() for Q in curvature.basis))
            )
    assert str(optimizer.report())
    train(model, optimizer, stream[4:])
    assert all_finite(model, optimizer)


def trace_of_batch(name, weights, batch):
    """tr F of one layer of the mlp: the mean square of its examples' gradients."""
    model = mlp()
    model.load_state_dict(weights)
    G = per_example_gradients(model, model.get_submodule(name), OBJECTIVES["empirical"], batch)
    return (G**2).sum() / G.shape[1]


def four_alike():
    """Layers of one shape, (4, 5), that are preconditioned in one go."""
    layers = [part for _ in range(4) for part in (nn.Linear(4, 4), nn.Tanh())]
    return double_precision(lambda: nn.Sequential(*layers[:-1], nn.Linear(4, CLASSES)))


@pytest.mark.parametrize(("before", "after"), [(None, 2), (2, None), (3, 1)])
@pytest.mark.parametrize(("method", "eigenbasis"), [(TKFAC, "eigh"), (TEKFAC, "qr")])
def test_layers_of_one_shape_may_for_a_while_have_bases_of_unequal_width(
    method, eigenbasis, before, after
):
    """Under turns they change one after the other; each takes its own step meanwhile."""
    cost = Cost(eigenbasis=eigenbasis, stagger=True, input_rank=before)
    options = {"momentum": 0.0, "interval": 5, "cost": cost}
    model, optimizer = trained(method, four_alike, steps=1, **options)
    optimizer.take(replace(optimizer.settings, cost=replace(cost, input_rank=after)))
    layers, widths = [layer.module for layer in optimizer.layers], set()
    for x, y in list(batches((4,), 7))[1:]:
        backward(model, optimizer, x, y)
        gradients = [torch.cat([m.weight.grad, m.bias.grad[:, None]], 1) for m in layers]
        start = [m.weight.detach().clone() for m in layers]
        optimizer.step()
        for module, M, W in zip(layers, gradients, start, strict=True):
            direction = 0.1 * optimizer.precondition(module, M)[:, :-1]
            assert_close((W - module.weight).detach(), 0.5 * direction.numpy(), rtol=1e-8)
        widths.add(tuple(c.basis.Q_in.shape[1] for c in optimizer.curvatures.values()))
    assert any(len(set(width)) == 2 for width in widths)
    assert {c.basis.Q_in.shape[1] for c in optimizer.curvatures.values()} == {after or 5}


@pytest.mark.parametrize("network", ["dense", "groups"])
@every_basis
def test_training_goes_on_bit_for_bit_from_any_step(method, eigenbasis, network):
    make, shape = NETWORKS[network]

    def build(model):
        cost = Cost(input_rank=2, eigenbasis=eigenbasis)
        return method(model, 0.5, damping=0.1, cost=cost, **UNEVEN)

    def build_otherwise(model):
        return method(model, 0.1)

    assert_resumes_from_any_step(make, build, build_otherwise, list(batches(shape, 4)))


@pytest.mark.parametrize(("inputs", "theirs"), [(3, None), (3, 3), (4, None), (4, 3), (6, 3)])
def test_a_state_of_layers_of_other_widths_is_refused_though_its_eigenvalues_fit(inputs, theirs):
    """D of 3 + 1 inputs, all of them kept, is as large as of 5 + 1 inputs of which 3 are."""

    def trained(inputs, k):
        model = double_precision(
            lambda: nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, CLASSES))
        )
        # no momentum that would give it away
        optimizer = TEKFAC(model, 0.01, momentum=0.0, cost=Cost(input_rank=k), **EVERY_STEP)
        train(model, optimizer, batches((inputs,), 2))
        return model, optimizer

    _, foreign = trained(inputs, theirs)
    model, optimizer = trained(5, 3)
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=r"\b0\b"):
        optimizer.load_state_dict(foreign.state_dict())
    assert_same_bits(everything(model, optimizer), before)
    train(model, optimizer, batches((5,), 1))


ON_RANKS = {
    "KFAC": (KFAC, Cost()),
    "TKFAC, truncated": (TKFAC, Cost(input_rank=3)),
    "EKFAC, truncated": (EKFAC, Cost(input_rank=3)),
    "TEKFAC, truncated, qr": (TEKFAC, Cost(input_rank=3, eigenbasis="qr")),
}


def play(rank):
    return {name: in_halves(name, slice(rank, None, 2), ranks=True) for name in ON_RANKS}


def in_halves(name, part=slice(None), ranks=False):
    """Convolutions in groups and a dense layer, trained on a part of every batch."""
    method, cost = ON_RANKS[name]
    model = separable()
    wrapped = DistributedDataParallel(model) if ranks else model
    optimizer = method(wrapped, 0.5, damping=0.1, cost=cost, interval=(1, 2, 1), warmup=0)
    train(wrapped, optimizer, [(x[part], y[part]) for x, y in batches((4, 5, 5), 4, N=40)])
    return {"model": model.state_dict(), "curvatures": optimizer.state_dict()["curvatures"]}


@needs_gloo
def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    one, other = on_two_ranks(play, tmp_path)
    assert_same_bits(one, other)
    for name in ON_RANKS:
        whole = in_halves(name)
        for parameter, value in whole["model"].items():
            assert_close(one[name]["model"][parameter], value, rtol=1e-9)
        for layer, curvature in whole["curvatures"].items():
            ours, theirs = (c["eigenvalues"] for c in (one[name]["curvatures"][layer], curvature))
            for field in theirs:
                assert_close(ours[field], theirs[field], rtol=1e-9)
