"""If this fails, a truncated basis that turns, grows or is loaded takes along another matrix.

What D stands for is written out here, (d_in · d_out)², from Q_in completed to a full basis by any
further columns, and the last column of D shared out evenly among them.
"""

import copy
import pickle
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from tekfac_edu import optim
from tekfac_edu.optim import TEKFAC

from .networks import CLASSES, batches, cnn, double_precision, mlp
from .oracles import assert_close, per_example_gradients, vec
from .test_input_rank import (
    METHODS,
    METHODS_AND_BASES,
    OBJECTIVES,
    completed,
    curvatures_of,
    gathered,
    run,
)
from .test_state import other_weights, through_a_file
from .training import (
    EVERY_STEP,
    UNEVEN,
    all_finite,
    assert_same_bits,
    backward,
    everything,
    parameters,
    train,
)

CORRECTED_AND_BASES = [pair for pair in METHODS_AND_BASES if pair[0] in ("EKFAC", "TEKFAC")]
every_basis = pytest.mark.parametrize(("name", "basis"), METHODS_AND_BASES)
by_qr = pytest.mark.parametrize("name", ["EKFAC", "TEKFAC"])
TURNING = {"factor_interval": 1, "eigen_interval": 1, "scale_interval": 1000}
RANKS = [None, 1, 2, 4]  # the mlp's layers have 5 and 6 inputs; with 5 one of them is truncated
PAIRS = [*product(RANKS, RANKS), (2, 5), (5, 2)]
pytestmark = [
    pytest.mark.filterwarnings("error::RuntimeWarning"),
    pytest.mark.usefixtures("one_thread"),
]


def dense(Q_in, Q_out, D):
    """(Q_in ⊗ Q_out) diag(D) (Q_in ⊗ Q_out)ᵀ, the last column of a thin D shared out."""
    d_in, k = Q_in.shape
    if k < d_in:
        D = np.hstack([D[:, :k], np.repeat(D[:, k:] / (d_in - k), d_in - k, 1)])
    Q = np.kron(completed(Q_in), Q_out)
    return (Q * vec(D)) @ Q.T


def diagonal(F, Q_in, Q_out):
    """D of a matrix in a basis: its diagonal, what belongs to no column of Q_in summed."""
    (d_in, k), d_out = Q_in.shape, len(Q_out)
    Q = np.kron(completed(Q_in), Q_out)
    D = np.diag(Q.T @ F @ Q).reshape(d_out, d_in, order="F")
    return gathered(D, k) if k < d_in else D


def held(curvature):
    """Q_in, Q_out and D, copied."""
    return [t.numpy().copy() for t in (curvature.Q_in, curvature.Q_out, curvature.eigenvalues)]


def built(name, input_rank, make=mlp, **options):
    model = make()
    settings = {"damping": 0.1, "input_rank": input_rank, "process_group": None}
    return model, getattr(optim, name)(model, 0.05, **(settings | options))


def loaded(name, input_rank, model, optimizer, make=mlp, **options):
    """Another pair, of that input_rank, with the state of this one."""
    other = built(name, input_rank, make, **options)
    state = through_a_file(everything(model, optimizer))
    other[0].load_state_dict(state["model"])
    other[1].load_state_dict(state["optimizer"])
    return other


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_eigenvalues_move_into_a_basis_of_as_many_more_or_fewer_columns(before, after):
    for name, basis in CORRECTED_AND_BASES:
        options = {"eigenbasis": basis, **TURNING}
        stream = list(batches((4,), 3))
        model, optimizer = built(name, before, **options)
        train(model, optimizer, stream[:2])
        old = {name: held(curvature) for name, curvature in curvatures_of(optimizer).items()}
        if after != before:
            model, optimizer = loaded(name, after, model, optimizer, **options)
        train(model, optimizer, stream[2:])
        for layer, curvature in curvatures_of(optimizer).items():
            d_in = len(curvature.Q_in)
            k = d_in if after is None else min(after, d_in)
            Q_in, Q_out, D = held(curvature)
            assert Q_in.shape == (d_in, k)
            assert curvature.scale_step == 0 and curvature.basis_step == 2
            assert_close(D, diagonal(dense(*old[layer]), Q_in, Q_out))
            assert_close(D.sum(), old[layer][2].sum(), rtol=1e-12)
            assert D.min() >= 0
            assert not np.allclose(abs(old[layer][1].T @ Q_out), np.eye(len(Q_out)), atol=1e-3)


@pytest.mark.parametrize(("before", "after"), [(None, 2), (2, None), (1, 3), (4, 2)])
@pytest.mark.parametrize("name", ["KFAC", "TKFAC"])
def test_eigenvalues_of_factors_are_those_of_the_loaded_ones_at_the_next_basis(name, before, after):
    stream = list(batches((4,), 3))
    model, optimizer = built(name, before, **EVERY_STEP)
    train(model, optimizer, stream[:2])
    model, optimizer = loaded(name, after, model, optimizer, **EVERY_STEP)
    train(model, optimizer, stream[2:])
    for curvature in curvatures_of(optimizer).values():
        S_in, S_out = (S.numpy() for S in curvature.factors.pair)
        scale = float(curvature.factors.delta) if name == "TKFAC" else 1.0
        Q_in, Q_out, D = held(curvature)
        assert Q_in.shape[1] == (len(S_in) if after is None else after)
        assert_close(D, diagonal(scale * np.kron(S_in, S_out), Q_in, Q_out))


@every_basis
def test_until_the_next_basis_a_loaded_state_goes_on_with_its_trace(name, basis):
    """Intervals 1, 3, 1: the step after loading measures, but has no new basis."""
    intervals = {"factor_interval": 1, "eigen_interval": 3, "scale_interval": 1}
    options = {"eigenbasis": basis, **intervals}
    stream = list(batches((4,), 5))
    for before, after in ((None, 2), (2, None), (1, 4), (4, 1)):
        model, optimizer = built(name, before, **options)
        train(model, optimizer, stream[:1])
        expected = {
            layer: c.eigenvalues.sum().item() for layer, c in curvatures_of(optimizer).items()
        }
        model, optimizer = loaded(name, after, model, optimizer, **options)
        if name in ("EKFAC", "TEKFAC"):
            of_batch = traces(model, stream[1], expected)
            expected = {layer: 0.95 * t + 0.05 * of_batch[layer] for layer, t in expected.items()}
        train(model, optimizer, stream[1:2])
        for layer, curvature in curvatures_of(optimizer).items():
            assert_close(curvature.eigenvalues.sum(), expected[layer])
            assert_close(curvature.spectrum.sum(), expected[layer])
            assert curvature.spectrum.shape == (len(curvature.Q_out), len(curvature.Q_in))
        assert str(optimizer.report())
        train(model, optimizer, stream[2:])
        assert all_finite(model, optimizer)
        for curvature in optimizer.curvatures.values():
            assert curvature.Q_in.shape[1] == (after or len(curvature.Q_in))


def traces(model, batch, layers):
    """tr F of a batch, of each layer: the mean square of its examples' gradients."""
    unwatched = mlp()
    unwatched.load_state_dict(model.state_dict())
    gradients = {
        layer: per_example_gradients(
            unwatched, unwatched.get_submodule(layer), OBJECTIVES["empirical"], batch
        )
        for layer in layers
    }
    return {layer: (G**2).sum() / G.shape[1] for layer, G in gradients.items()}


def four_alike():
    """Layers of one shape, (4, 5), that are preconditioned in one go."""
    layers = [part for _ in range(4) for part in (nn.Linear(4, 4), nn.Tanh())]
    return double_precision(lambda: nn.Sequential(*layers[:-1], nn.Linear(4, CLASSES)))


@pytest.mark.parametrize(("before", "after"), [(None, 2), (2, None), (3, 1)])
@pytest.mark.parametrize(
    ("name", "basis"), [("TKFAC", "eigh"), ("EKFAC", "eigh"), ("TEKFAC", "qr")]
)
def test_layers_of_one_shape_may_for_a_while_have_bases_of_unequal_width(
    name, basis, before, after
):
    """Under turns they change one after the other; each takes its own step meanwhile."""
    intervals = dict.fromkeys(EVERY_STEP, 5)
    options = {"eigenbasis": basis, "stagger": True, "momentum": 0.0, **intervals}
    stream = list(batches((4,), 7))
    model, optimizer = built(name, before, make=four_alike, **options)
    train(model, optimizer, stream[:1])
    model, optimizer = loaded(name, after, model, optimizer, four_alike, **options)
    widths = set()
    for x, y in stream[1:]:
        backward(model, optimizer, x, y)
        gradients = [torch.cat([m.weight.grad, m.bias.grad[:, None]], 1) for m in layers_of(model)]
        start = [m.weight.detach().clone() for m in layers_of(model)]
        optimizer.step()
        for module, M, W in zip(layers_of(model), gradients, start, strict=True):
            direction = optimizer.precondition(module, M)[:, :-1]
            assert_close((W - module.weight).detach(), 0.05 * direction.numpy(), rtol=1e-8)
        widths.add(tuple(c.Q_in.shape[1] for c in curvatures_of(optimizer).values()))
    assert any(len(set(width)) == 2 for width in widths)
    assert {c.Q_in.shape[1] for c in curvatures_of(optimizer).values()} == {after or 5}


def layers_of(model):
    return [module for module in model if isinstance(module, nn.Linear)]


@pytest.mark.filterwarnings("default:.*eigendecomposition")
def test_a_loaded_basis_that_cannot_be_replaced_is_kept_as_wide_as_it_was(monkeypatch):
    stream = list(batches((4,), 3))
    model, optimizer = built("TEKFAC", 2, **EVERY_STEP)
    train(model, optimizer, stream[:2])
    bases = {name: c.Q_in.clone() for name, c in curvatures_of(optimizer).items()}
    model, optimizer = loaded("TEKFAC", 3, model, optimizer, **EVERY_STEP)

    def fail(_):
        raise torch.linalg.LinAlgError("linalg.eigh: failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with pytest.warns(RuntimeWarning, match="eigendecomposition"):
        train(model, optimizer, stream[2:])
    for name, curvature in curvatures_of(optimizer).items():
        assert torch.equal(curvature.Q_in, bases[name])
        assert curvature.eigenvalues.shape[1] == 3
    assert all_finite(model, optimizer)


@by_qr
def test_a_refresh_is_one_warm_iteration_on_the_columns_there_are(name):
    """Q ← qr(S Q), columns in descending order of qᵀSq, in NumPy."""
    model, optimizer = built(name, 3, eigenbasis="qr", **EVERY_STEP)
    stream = list(batches((4,), 5))
    train(model, optimizer, stream[:1])
    for batch in stream[1:]:
        before = {layer: held(curvature) for layer, curvature in curvatures_of(optimizer).items()}
        train(model, optimizer, [batch])
        for layer, curvature in curvatures_of(optimizer).items():
            S = curvature.factors.pair[0].numpy()
            Q = before[layer][0]
            order = np.argsort(-np.diag(Q.T @ S @ Q))
            expected = np.linalg.qr(S @ Q[:, order])[0]
            assert_close(abs(expected.T @ curvature.Q_in.numpy()), np.eye(3))


def scaled_stream(steps):
    """The same batch again and again; its inputs' second moments fall by about 4 each."""
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(60, 9, generator=draw, dtype=torch.float64) * 0.5 ** torch.arange(9)
    mix = torch.linalg.qr(torch.randn(9, 9, generator=draw, dtype=torch.float64))[0]
    return [(x @ mix, torch.randint(CLASSES, (60,), generator=draw))] * steps


def one_wide_layer():
    return double_precision(
        lambda: nn.Sequential(nn.Linear(9, 4, bias=False), nn.Tanh(), nn.Linear(4, CLASSES))
    )


@by_qr
def test_warm_iterations_converge_to_the_leading_eigenvectors(name):
    """With factors that stay: errors fall by the ratio of neighbouring eigenvalues, about 4."""
    options = {"eigenbasis": "qr", "lr_other": 0.0, **EVERY_STEP}
    model, optimizer = built(name, 4, one_wide_layer, **options)
    optimizer.param_groups[0]["lr"] = 0.0
    before = parameters(model)
    train(model, optimizer, scaled_stream(30))
    assert torch.equal(parameters(model), before)
    curvature = curvatures_of(optimizer)["0"]
    values, V = np.linalg.eigh(curvature.factors.pair[0].numpy())
    assert (values[1:] / values[:-1]).min() > 2
    assert_close(abs(V[:, -4:][:, ::-1].T @ curvature.Q_in.numpy()), np.eye(4), rtol=1e-8)


@by_qr
def test_a_first_basis_is_near_the_leading_eigenvectors(name):
    """Some iterations: one from random columns leaves sines of 1/2, each further one about 1/4."""
    model, optimizer = built(name, 4, one_wide_layer, eigenbasis="qr", **EVERY_STEP)
    train(model, optimizer, scaled_stream(1))
    curvature = curvatures_of(optimizer)["0"]
    S, Q = curvature.factors.pair[0].numpy(), curvature.Q_in.numpy()
    values, V = np.linalg.eigh(S)
    assert_close(Q.T @ Q, np.eye(4))
    assert np.linalg.norm(Q - V[:, -4:] @ (V[:, -4:].T @ Q), 2) < 0.05
    assert 0.999 < np.trace(Q.T @ S @ Q) / values[-4:].sum() < 1 + 1e-12


@by_qr
def test_a_first_basis_is_the_same_every_time_and_draws_nothing_of_torch_s(name):
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        model, optimizer = built(name, 2, eigenbasis="qr", **EVERY_STEP)
        train(model, optimizer, batches((4,), 3))
        states.append(everything(model, optimizer))
        if seed == 1:
            assert torch.equal(torch.random.get_rng_state(), torch_state_after(before))
    assert_same_bits(*states)


def torch_state_after(state):
    """What building the network and the optimizer, without any step, leave of a state."""
    torch.random.set_rng_state(state)
    built("TEKFAC", 2)
    return torch.random.get_rng_state()


@by_qr
def test_under_qr_no_large_matrix_is_ever_decomposed(name, monkeypatch):
    sizes, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda S: sizes.append(len(S)) or eigh(S))
    model, optimizer = built(name, 2, one_wide_layer, eigenbasis="qr", **EVERY_STEP)
    train(model, optimizer, scaled_stream(1))
    assert 9 not in sizes  # the inputs of the first layer
    assert 5 not in sizes  # and of the second; outputs are 4 and 3
    del sizes[:]
    train(model, optimizer, scaled_stream(3))
    assert sizes == []


@every_basis
def test_training_goes_on_bit_for_bit_from_any_step(name, basis):
    for make, shape, k, fisher in ((mlp, (4,), 2, "mc"), (cnn, (1, 6, 6), 4, "empirical")):
        stream = list(batches(shape, 5))

        def build(model, seed, k=k, fisher=fisher):
            generator = torch.Generator().manual_seed(seed) if fisher == "mc" else None
            settings = {"fisher": fisher, "generator": generator, "eigenbasis": basis, **UNEVEN}
            return model, getattr(optim, name)(model, 0.05, input_rank=k, damping=0.1, **settings)

        model, optimizer = build(make(), 5)
        saved = []
        for batch in stream:
            saved.append(through_a_file(everything(model, optimizer)))
            train(model, optimizer, [batch])
        expected = everything(model, optimizer)
        for step, state in enumerate(saved):
            resumed, again = build(other_weights(make()), 6)
            resumed.load_state_dict(state["model"])
            again.load_state_dict(state["optimizer"])
            assert_same_bits(everything(resumed, again), state)
            train(resumed, again, stream[step:])
            assert_same_bits(everything(resumed, again), expected)


@every_basis
def test_a_copied_pair_trains_by_itself_and_equally(name, basis):
    stream = list(batches((4,), 6))
    for duplicate in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        for steps in (0, 3):
            model, optimizer = built(name, 2, eigenbasis=basis, **UNEVEN)
            train(model, optimizer, stream[:steps])
            at_the_copy = everything(model, optimizer)
            other, copied = duplicate((model, optimizer))
            train(model, optimizer, stream[steps:])
            assert_same_bits(everything(other, copied), at_the_copy)
            train(other, copied, stream[steps:])
            assert_same_bits(everything(other, copied), everything(model, optimizer))
            assert "input_rank=2" in repr(copied)


KEYS = ("Q_in", "Q_out", "s_in", "s_out", "eigenvalues", "basis_step", "scale_step", "factors")


@pytest.mark.parametrize("input_rank", [None, 3])
@pytest.mark.parametrize("name", METHODS)
def test_a_state_of_before_there_was_the_option_is_loaded(name, input_rank):
    model, optimizer = built(name, None, **UNEVEN)
    stream = list(batches((4,), 7))
    train(model, optimizer, stream[:3])
    state = through_a_file(optimizer.state_dict())
    curvatures = {
        layer: {key: curvature[key] for key in KEYS}
        for layer, curvature in state["curvatures"].items()
    }
    resumed, again = built(name, input_rank, **UNEVEN)
    resumed.load_state_dict(model.state_dict())
    again.load_state_dict({**state, "curvatures": curvatures})
    train(model, optimizer, stream[3:])
    train(resumed, again, stream[3:])
    if input_rank is None:
        assert_same_bits(everything(resumed, again), everything(model, optimizer))
    assert all_finite(resumed, again)


@pytest.mark.parametrize(("inputs", "theirs"), [(3, None), (3, 3), (4, None), (4, 3), (6, 3)])
def test_a_state_of_layers_of_other_widths_is_refused_though_its_eigenvalues_fit(inputs, theirs):
    """D of 3 + 1 inputs, all of them kept, is as large as of 5 + 1 inputs of which 3 are."""

    def network(inputs):
        return double_precision(
            lambda: nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, CLASSES))
        )

    def trained(inputs, k):
        options = {"momentum": 0.0, **EVERY_STEP}  # no momentum that would give it away
        model, optimizer = built("TEKFAC", k, lambda: network(inputs), **options)
        train(model, optimizer, batches((inputs,), 2))
        return model, optimizer

    _, foreign = trained(inputs, theirs)
    model, optimizer = trained(5, 3)
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=r"\b0\b"):
        optimizer.load_state_dict(foreign.state_dict())
    assert_same_bits(everything(model, optimizer), before)
    train(model, optimizer, batches((5,), 1))


def test_looking_changes_nothing():
    """Nor does a spectrum that was asked for hang on to what it was made of."""
    expected = everything(*run(TEKFAC, mlp, (4,), 2))
    model = mlp()
    optimizer = TEKFAC(model, 0.05, damping=0.1, input_rank=2, **UNEVEN)
    for x, y in batches((4,), 4):
        backward(model, optimizer, x, y)
        str(optimizer.report()), repr(optimizer), optimizer.state_dict()
        optimizer.step()
        for curvature in optimizer.curvatures.values():
            curvature.spectrum.zero_()
    assert_same_bits(everything(model, optimizer), expected)
