"""If this fails, a layer of many inputs is preconditioned by another matrix than `input_rank` says.

With Q_in completed by any further columns to a full basis, and D the eigenvalues in it:

    D[i, j]  for j < k,    r_i = mean of D[i, j] over the d_in − k other j

The oracle has full bases from NumPy, and the whole matrix; it shares the rest out at the end.
"""

import os
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import combinations, product

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from tekfac_edu import optim
from tekfac_edu.optim import TEKFAC

from . import two_processes
from .dense_training import (
    CORRECTED,
    INDEPENDENCE,
    DenseLayer,
    DenseTraining,
    Settings,
    looped_rows,
)
from .networks import CASES, batches, cnn, mlp, one_layer
from .oracles import (
    assert_close,
    cross_entropy,
    factors_of_independence,
    layer_rows,
    objectives_categorical,
    objectives_empirical,
    per_example_gradients,
    second_moments,
    trace_restricted_numerators,
    vec,
)
from .training import (
    EVERY_STEP,
    UNEVEN,
    all_finite,
    assert_same_bits,
    backward,
    every_method,
    everything,
    parameters,
    train,
)

OBJECTIVES = {"empirical": objectives_empirical(cross_entropy), "exact": objectives_categorical}
METHODS = ["KFAC", "EKFAC", "TKFAC", "TEKFAC"]
# every basis that a method can have
METHODS_AND_BASES = [*((name, "eigh") for name in METHODS), ("EKFAC", "qr"), ("TEKFAC", "qr")]
# T = 1; positions, formed first and projected first; a layer used several times
NAMES = [
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
]
FEW_POSITIONS = [
    one_layer("Linear, two positions, five outputs", (2, 4), nn.Linear, 4, 5),
    one_layer("Conv2d, four positions, six outputs", (1, 4, 4), nn.Conv2d, 1, 6, 3),
]
CHOSEN = [case for name in NAMES for case in CASES if case.name == name] + FEW_POSITIONS
assert len(CHOSEN) == len(NAMES) + 2
every_case = pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.name)
every_fisher = pytest.mark.parametrize("fisher", OBJECTIVES)
every_name = pytest.mark.parametrize("name", METHODS)
every_basis = pytest.mark.parametrize(("name", "basis"), METHODS_AND_BASES)
RANKS = (1, 3)  # of 4 inputs at least: three to share, and one or more
# a warning about a network that is all right is a fault too
pytestmark = [
    pytest.mark.filterwarnings("error::RuntimeWarning"),
    pytest.mark.usefixtures("one_thread"),
]


@cache
def oracle(case, fisher):
    """a, g and the per-example gradients of `layer`."""
    model, batch = case.make(), case.batch()
    which = model, model.layer, OBJECTIVES[fisher], batch
    return *layer_rows(*which), per_example_gradients(*which)


def after_one_step(case, name, fisher="empirical", parts=None, **options):
    """The optimizer, the module `layer` and its curvature."""
    model, (x, y) = case.make(), case.batch()
    settings = {"fisher": fisher, "process_group": None, "momentum": 0.0, **EVERY_STEP}
    optimizer = getattr(optim, name)(model, 0.01, **(settings | options))
    parts = parts or [slice(None)]
    for part in parts:
        outputs = model(x[part])
        if fisher != "empirical":
            optimizer.accumulate_fisher(outputs)
        (functional.cross_entropy(outputs, y[part]) / len(parts)).backward()
    optimizer.step()
    return optimizer, model.layer, curvatures_of(optimizer)["layer"]


def curvatures_of(optimizer):
    return {layer.name: optimizer.curvatures[layer] for layer in optimizer.layers}


def factors(name, a, g):
    """The input and output side's matrices, and what their Kronecker product is multiplied by."""
    if name in INDEPENDENCE:
        return *factors_of_independence(a, g), 1.0
    delta, left, right = trace_restricted_numerators(a, g)
    return left / delta, right / delta, delta


def completed(Q):
    """Columns that make an orthonormal set a basis, behind it."""
    return np.hstack([Q, np.linalg.qr(Q, mode="complete")[0][:, Q.shape[1] :]])


def gathered(D, k):
    """(d_out, d_in) -> (d_out, k + 1): the columns from k on are summed."""
    return np.hstack([D[:, :k], D[:, k:].sum(1, keepdims=True)])


def shared_out(D, k):
    """(d_out, d_in), the columns from k on replaced by their mean."""
    mean = D[:, k:].mean(1, keepdims=True)
    return np.hstack([D[:, :k], np.repeat(mean, D.shape[1] - k, 1)])


class TruncatedLayer(DenseLayer):
    """A layer whose smaller input eigenvalues are replaced by their mean, all but k of them."""

    def __init__(self, method, settings, k):
        super().__init__(method, settings)
        self.k = k

    def update(self, step, a, g):
        super().update(step, a, g)
        (Q_in, Q_out), (scale, left, right) = self.bases, self.held
        d_out, d_in = len(Q_out), len(Q_in)
        if d_in <= self.k:
            return
        Q_in = Q_in[:, ::-1]  # largest first
        s_in = np.diag(Q_in.T @ left @ Q_in)[None]
        self.held = (scale, (Q_in * shared_out(s_in, self.k)) @ Q_in.T, right)
        Q = np.kron(Q_in, Q_out)
        D = np.diag(Q.T @ self.scaled @ Q).reshape(d_out, d_in, order="F")
        self.scaled = (Q * vec(shared_out(D, self.k))) @ Q.T


@dataclass
class TruncatedTraining(DenseTraining):
    k: int = 1

    def __post_init__(self):
        super().__post_init__()
        self.layers = {
            module: TruncatedLayer(self.method, self.settings, self.k) for module in self.layers
        }


def truncated_layer(case, name, fisher, k, **settings):
    a, g, _ = oracle(case, fisher)
    layer = TruncatedLayer(name, Settings(**settings), k)
    layer.update(0, a, g)
    return layer


@every_case
def test_the_basis_is_the_leading_eigenvectors_of_the_input_side(case):
    a, g, _ = oracle(case, "empirical")
    for name, k in product(METHODS, RANKS):
        S_in, S_out, _ = factors(name, a, g)
        V_in, V_out = np.linalg.eigh(S_in)[1], np.linalg.eigh(S_out)[1]
        _, _, curvature = after_one_step(case, name, input_rank=k)
        Q_in, Q_out = curvature.Q_in.numpy(), curvature.Q_out.numpy()
        assert (Q_in.shape, Q_out.shape) == ((len(S_in), k), S_out.shape)
        assert_close(Q_in.T @ Q_in, np.eye(k))
        assert_close(abs(V_in[:, -k:].T @ Q_in).max(0), np.ones(k))
        assert_close(Q_out.T @ Q_out, np.eye(len(S_out)))
        if np.linalg.matrix_rank(S_out) >= len(S_out) - 1:
            assert_close(abs(V_out.T @ Q_out).max(0), np.ones(len(S_out)))


@every_case
@every_fisher
def test_eigenvalues_are_measured_in_the_basis_and_the_last_column_has_the_rest(case, fisher):
    a, g, G = oracle(case, fisher)
    for (name, basis), k in product(METHODS_AND_BASES, RANKS):
        S_in, S_out, scale = factors(name, a, g)
        options = {"fisher": fisher, "eigenbasis": basis}
        _, _, curvature = after_one_step(case, name, input_rank=k, **options)
        Q_in, Q_out = completed(curvature.Q_in.numpy()), curvature.Q_out.numpy()
        s_in, s_out = np.diag(Q_in.T @ S_in @ Q_in), np.diag(Q_out.T @ S_out @ Q_out)
        corrected = name in CORRECTED
        D = second_moments(G, Q_in, Q_out) if corrected else scale * np.outer(s_out, s_in)
        assert_close(curvature.eigenvalues, gathered(D, k))
        assert_close(curvature.spectrum, shared_out(D, k))
        trace = (G**2).sum() / G.shape[1] if corrected else scale * np.trace(S_in) * np.trace(S_out)
        assert_close(curvature.eigenvalues.sum(), trace)
        assert_close(curvature.spectrum.sum(), trace)
        if not corrected:
            assert_close(curvature.s_in, scale**0.5 * gathered(s_in[None], k)[0])
            assert_close(curvature.s_out, scale**0.5 * s_out)


@every_case
@every_fisher
def test_the_preconditioner_is_that_of_the_whole_matrix_with_the_rest_shared(case, fisher):
    draw = np.random.default_rng(5)
    for name, k, rule in product(METHODS, RANKS, ("paper", "added")):
        options = {"fisher": fisher, "damping_rule": rule, "damping": 0.03}
        optimizer, module, _ = after_one_step(case, name, input_rank=k, **options)
        layer = truncated_layer(case, name, fisher, k, damping_rule=rule)
        d_in, d_out = (len(Q) for Q in layer.bases)
        M = draw.normal(size=(d_out, d_in)) * np.arange(1, d_in + 1)
        expected = np.linalg.solve(layer.damped(0.03), vec(M)).reshape(M.shape, order="F")
        assert_close(optimizer.precondition(module, torch.tensor(M)), expected)


NETWORKS = {
    "mlp": (mlp, (4,), 2),
    "mlp, one layer of two": (mlp, (4,), 5),
    "cnn": (cnn, (1, 6, 6), 4),
}
RUNS = [
    ("mlp", (1, 1, 1)),
    ("mlp", (2, 3, 1)),
    ("mlp, one layer of two", (3, 1, 2)),
    ("cnn", (1, 2, 1)),
    ("cnn", (3, 1, 2)),
]


def examples_alone(model):
    """Norms with fixed statistics: what an example sends back does not depend on the others."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def compare(network, name, steps, settings):
    """Train one copy by the package and one by dense algebra; their changes must agree."""
    make, shape, k = NETWORKS[network]
    start, ours, theirs = (examples_alone(make()) for _ in range(3))
    options = {"process_group": None, "input_rank": k}
    optimizer = getattr(optim, name)(ours, **asdict(settings), **options)
    rows = looped_rows(OBJECTIVES["empirical"])
    dense = TruncatedTraining(theirs, name, settings, cross_entropy, rows, k=k)
    for batch in batches(shape, steps):
        backward(ours, optimizer, *batch)
        optimizer.step()
        dense.step(batch)
    for before, one, other in zip(*(m.parameters() for m in (start, ours, theirs)), strict=True):
        assert not torch.equal(one, before)
        assert_close(one - before, (other - before).detach().numpy())
    truncated = [layer for layer in optimizer.layers if layer.d_in > k]
    assert truncated
    for layer in truncated:
        assert optimizer.curvatures[layer].Q_in.shape == (layer.d_in, k)


@pytest.mark.parametrize(("network", "intervals"), RUNS, ids=str)
@every_name
def test_training_arrives_where_dense_algebra_does(network, name, intervals):
    """Five steps: bases turn under running averages, and D moves with them."""
    names = ("factor_interval", "eigen_interval", "scale_interval")
    settings = Settings(
        lr=0.05,
        momentum=0.8,
        weight_decay=0.3,
        factor_decay=0.7,
        scale_decay=0.4,
        **dict(zip(names, intervals, strict=True)),
    )
    compare(network, name, 5, settings)


VARIANTS = {
    "damping added": Settings(damping_rule="added"),
    "trace": Settings(damping_policy="trace", lr=0.01, lr_other=0.1),
    "trace, damping added, sgd scale": Settings(
        damping_policy="trace", damping_rule="added", lr_scale="sgd", lr=0.3
    ),
    "warm-up": Settings(warmup_steps=2, factor_interval=3, scale_interval=4),
}


@pytest.mark.parametrize("variant", VARIANTS)
@every_name
def test_variants_of_the_update(name, variant):
    settings = replace(VARIANTS[variant], momentum=0.5, weight_decay=0.1, eigen_interval=2)
    compare("cnn", name, 3, settings)


def run(method, make, shape, input_rank, steps=4, **options):
    model = make()
    settings = {"damping": 0.1, "input_rank": input_rank, **UNEVEN}
    optimizer = method(model, 0.05, **(settings | options))
    train(model, optimizer, batches(shape, steps))
    return model, optimizer


@pytest.mark.parametrize("options", [{}, {"stagger": True, "fisher": "exact"}], ids=str)
@every_basis
def test_layers_of_no_more_inputs_are_as_without_to_the_last_bit(name, basis, options):
    """The cnn's layers have 9, 9 and 4 inputs; the mlp's 5 and 6."""
    method, options = getattr(optim, name), {"eigenbasis": basis, **options}
    for make, shape, widest in ((cnn, (1, 6, 6), 9), (mlp, (4,), 6)):
        expected = everything(*run(method, make, shape, None, **options))
        for k in (widest, 10**9):
            assert_same_bits(everything(*run(method, make, shape, k, **options)), expected)


@every_method
def test_only_the_layers_of_more_inputs_are_truncated(method):
    _, mixed = run(method, mlp, (4,), 5, steps=1)
    _, full = run(method, mlp, (4,), None, steps=1)
    states = [optimizer.state_dict()["curvatures"] for optimizer in (mixed, full)]
    assert_same_bits(states[0]["0"], states[1]["0"])
    assert [states[0][name]["Q_in"].shape for name in ("0", "2")] == [(5, 5), (6, 5)]
    for curvature in (curvatures_of(mixed)["0"], *curvatures_of(full).values()):
        assert torch.equal(curvature.spectrum, curvature.eigenvalues)


@every_basis
def test_parts_of_a_batch_are_its_whole(name, basis):
    parts = [slice(0, 3), slice(3, 4), slice(4, 7)]
    for case in (CHOSEN[0], CHOSEN[5], FEW_POSITIONS[1]):
        whole, parted = (
            after_one_step(case, name, "exact", split, input_rank=3, eigenbasis=basis)[2]
            for split in (None, parts)
        )
        assert_close(parted.eigenvalues, whole.eigenvalues)
        assert_close(abs(parted.Q_in.T @ whole.Q_in), np.eye(3))


@pytest.mark.parametrize("fisher", ["empirical", "exact", "mc"])
def test_memory_for_one_example_at_a_time_is_enough(fisher, monkeypatch):
    def measured(case, name):
        generator = torch.Generator().manual_seed(3)
        return after_one_step(case, name, fisher, input_rank=2, generator=generator)[2].eigenvalues

    for case, name in product((CHOSEN[0], CHOSEN[5], FEW_POSITIONS[0]), METHODS):
        roomy = measured(case, name)
        with monkeypatch.context() as patch:
            patch.setattr("tekfac_edu.optim.batch.CHUNK", 1)
            cramped = measured(case, name)
        assert_close(cramped, roomy)


@pytest.mark.parametrize("fisher", OBJECTIVES)
@pytest.mark.parametrize("name", CORRECTED)
def test_drawn_examples_are_those_of_one_subset(name, fisher):
    for case in (CHOSEN[0], CHOSEN[3], CHOSEN[5], FEW_POSITIONS[1]):
        curvature = after_one_step(case, name, fisher, input_rank=2, scale_examples=3)[2]
        _, _, G = oracle(case, fisher)
        Q_in, Q_out = completed(curvature.Q_in.numpy()), curvature.Q_out.numpy()
        found = []
        for subset in combinations(range(G.shape[1]), 3):
            D = gathered(second_moments(G[:, list(subset)], Q_in, Q_out), 2)
            if abs(curvature.eigenvalues.numpy() - D).max() <= 1e-10 * D.max():
                found.append(subset)
        assert len(found) == 1


@every_basis
def test_factors_are_what_they_are_without(name, basis):
    """From all positions or from drawn ones."""
    for case in (CHOSEN[3], CHOSEN[5], CHOSEN[9]):
        for rows in (None, 0.7):
            options = {"factor_rows": rows, "eigenbasis": basis}
            truncated, full = (
                after_one_step(case, name, input_rank=k, **options)[2] for k in (2, None)
            )
            for field, tensor in vars(full.factors).items():
                assert torch.equal(getattr(truncated.factors, field), tensor)
            assert_close(full.eigenvalues.sum(), truncated.eigenvalues.sum())


@every_method
def test_layers_that_take_turns_have_what_they_would_have_without(method):
    """Each is as in an ordinary run that saw the batches of its turns alone."""
    stream, options = list(batches((4,), 6)), {"damping": 0.1, "input_rank": 3}
    intervals = dict.fromkeys(EVERY_STEP, 3)
    model = mlp()
    optimizer = method(model, 0.0, stagger=True, **intervals, **options)
    train(model, optimizer, stream)
    assert len(set(optimizer.turns.values())) == 2
    for layer in optimizer.layers:
        turn, other = optimizer.turns[layer], mlp()
        alone = method(other, 0.0, **EVERY_STEP, **options)
        train(other, alone, [batch for s, batch in enumerate(stream) if s == 0 or s % 3 == turn])
        theirs = curvatures_of(alone)[layer.name].state_dict()
        ours = optimizer.curvatures[layer].state_dict()
        steps = {"basis_step": None, "scale_step": None}
        assert_same_bits(ours | steps, theirs | steps)


@every_basis
def test_the_table_is_of_all_eigenvalues_the_shared_ones_too(name, basis):
    """Of the whole matrix of the oracle, and of the direction that it gives."""
    case, k = CASES[0], 2
    options = {"damping_rule": "added", "eigenbasis": basis, "input_rank": k}
    optimizer, module, curvature = after_one_step(case, name, damping=1e-3, **options)
    if basis == "eigh":
        layer = truncated_layer(case, name, "empirical", k, damping_rule="added")
        D = np.linalg.eigvalsh(layer.dense())
    else:
        D = np.sort(curvature.spectrum.numpy().flatten())
    row = optimizer.report().rows[0]
    assert (row.name, row.d_out, row.d_in) == ("layer", 5, 5)
    assert row.largest == pytest.approx(D[-1], rel=1e-9)
    assert row.smallest == pytest.approx(D[0], abs=1e-9 * D[-1])
    assert row.median == pytest.approx(D[(len(D) - 1) // 2], abs=1e-9 * D[-1])
    assert row.swamped == pytest.approx(np.mean(D < 1e-3))
    assert 0 < row.swamped < 1
    M = torch.cat([module.weight.grad, module.bias.grad[:, None]], 1)
    direction = optimizer.precondition(module, M)
    cosine = (direction * M).sum() / direction.norm() / M.norm()
    assert row.cosine == pytest.approx(cosine.item(), rel=1e-12)
    assert str(optimizer.report())


@every_basis
def test_products_in_bfloat16_are_near_and_statistics_the_same(name, basis):
    """Bound as without: two operands rounded to 8 bits, in a few products."""
    draw = torch.Generator().manual_seed(0)
    for case in (CHOSEN[1], CHOSEN[5]):
        options = {"input_rank": 3, "eigenbasis": basis, "damping": 0.1}
        full, cheap = (
            after_one_step(case, name, precision=precision, **options)
            for precision in ("full", "bfloat16")
        )
        assert_same_bits(full[2].state_dict(), cheap[2].state_dict())
        shape = full[2].spectrum.shape
        M = torch.randn(shape, generator=draw, dtype=torch.float64)
        exact, rounded = (o.precondition(module, M) for o, module, _ in (full, cheap))
        distance = (rounded - exact).norm() / exact.norm()
        assert rounded.dtype == exact.dtype
        assert 1e-4 < distance < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "basis"), [("KFAC", "eigh"), ("TEKFAC", "eigh"), ("EKFAC", "qr")])
def test_narrow_weights_have_curvature_in_float32(name, basis, dtype):
    stream = [(x.to(dtype), y) for x, y in batches((4,), 4)]
    model, exact = mlp().to(dtype), mlp()
    options = {"damping": 0.1, "input_rank": 2, "eigenbasis": basis, **EVERY_STEP}
    optimizer, other = (getattr(optim, name)(m, 0.05, **options) for m in (model, exact))
    train(model, optimizer, stream)
    train(exact, other, [(x.double(), y) for x, y in stream])
    assert all_finite(model, optimizer)
    for curvature in optimizer.curvatures.values():
        for tensor in (curvature.Q_in, curvature.eigenvalues, curvature.spectrum):
            assert tensor.dtype == torch.float32
    assert parameters(model).dtype == dtype
    start, tolerance = parameters(mlp()), 1e-3 if dtype == torch.float32 else 0.1
    expected = parameters(exact) - start
    distance = (parameters(model).double() - start - expected).norm() / expected.norm()
    assert distance < tolerance


DEGENERATE = {
    "one example": lambda x, y: (x[:1], y[:1]),
    "the same example": lambda x, y: (x[:1].repeat(4, 1), y[:1].repeat(4)),
    "nothing but zeros": lambda x, y: (0 * x, y),
    "two inputs of four": lambda x, y: (x * torch.tensor([1, 0, 1, 0]), y),
    "huge and tiny": lambda x, y: (x * torch.tensor([1e6, 1, 1e-3, 1e-6]), y),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", DEGENERATE)
def test_inputs_in_few_directions_leave_nothing_negative_and_nothing_infinite(kind, dtype):
    """A rest of zero, though it is a difference or a sum of rounded numbers, is not below it."""
    error = 1e-12 if dtype == torch.float64 else 1e-5
    for name, basis in METHODS_AND_BASES:
        model = CASES[1].make().to(dtype)  # no bias, four inputs
        options = {"damping": 1e-4, "input_rank": 3, "eigenbasis": basis, **EVERY_STEP}
        optimizer = getattr(optim, name)(model, 1e-4, **options)
        for x, y in batches((4,), 4):
            train(model, optimizer, [DEGENERATE[kind](x.to(dtype), y)])
            for layer, curvature in optimizer.curvatures.items():
                Q = curvature.Q_in.double().numpy()
                assert Q.shape == (layer.d_in, 3)
                assert abs(Q.T @ Q - np.eye(3)).max() < error
                assert curvature.eigenvalues.min() >= 0
        assert all_finite(model, optimizer)


@pytest.mark.parametrize("value", [0, -1, 1.5, "a", True, False, float("nan"), "10"])
def test_what_is_no_number_of_directions_is_refused_by_name(value):
    with pytest.raises(ValueError, match=rf"\binput_rank\b.*{value!r}"):
        TEKFAC(mlp(), 0.1, input_rank=value)


def test_repr_shows_the_setting():
    assert "input_rank=3" in repr(TEKFAC(mlp(), 0.1, input_rank=3))
    assert "input_rank=None" in repr(TEKFAC(mlp(), 0.1))


def fail(*_):
    raise torch.linalg.LinAlgError("linalg.eigh: failed to converge")


def nan_from(qr):
    return lambda *args, **named: tuple(torch.nan * part for part in qr(*args, **named))


@every_name
def test_without_any_basis_it_goes_on_in_the_first_coordinates(name, monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    for case, k in product((CHOSEN[0], CHOSEN[5]), RANKS):
        with pytest.warns(RuntimeWarning, match="eigendecomposition"):
            optimizer, module, curvature = after_one_step(case, name, input_rank=k, damping=0.1)
        a, g, G = oracle(case, "empirical")
        S_in, S_out, scale = factors(name, a, g)
        d_in, d_out = len(S_in), len(S_out)
        assert torch.equal(curvature.Q_in, torch.eye(d_in, dtype=torch.float64)[:, :k])
        assert torch.equal(curvature.Q_out, torch.eye(d_out, dtype=torch.float64))
        D = scale * np.outer(np.diag(S_out), np.diag(S_in))
        if name in CORRECTED:
            D = second_moments(G, np.eye(d_in), np.eye(d_out))
        else:
            s_in = gathered(np.diag(S_in)[None], k)[0]
            assert_close(curvature.s_in, scale**0.5 * s_in)
        assert_close(curvature.eigenvalues, gathered(D, k))
        ones = torch.ones(d_out, d_in, dtype=torch.float64)
        assert optimizer.precondition(module, ones).isfinite().all()


@pytest.mark.parametrize("name", CORRECTED)
def test_the_same_where_a_first_qr_iteration_fails(name, monkeypatch):
    monkeypatch.setattr(torch.linalg, "qr", nan_from(torch.linalg.qr))
    with pytest.warns(RuntimeWarning, match="not finite"):
        curvature = after_one_step(CASES[0], name, input_rank=2, eigenbasis="qr")[2]
    assert torch.equal(curvature.Q_in, torch.eye(5, dtype=torch.float64)[:, :2])
    assert curvature.eigenvalues.isfinite().all()


@every_basis
def test_a_later_failure_keeps_the_truncated_basis(name, basis, monkeypatch):
    model = mlp()
    options = {"damping": 0.1, "input_rank": 2, "eigenbasis": basis, **EVERY_STEP}
    optimizer = getattr(optim, name)(model, 0.05, **options)
    stream = list(batches((4,), 4))
    train(model, optimizer, stream[:2])
    before = {layer: curvature.Q_in.clone() for layer, curvature in optimizer.curvatures.items()}
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    monkeypatch.setattr(torch.linalg, "qr", nan_from(torch.linalg.qr))
    with pytest.warns(RuntimeWarning, match="keeps its last basis"):
        train(model, optimizer, stream[2:])
    for layer, curvature in optimizer.curvatures.items():
        assert torch.equal(curvature.Q_in, before[layer])
        assert curvature.basis_step == 1
    assert all_finite(model, optimizer)


ON_RANKS = [("TKFAC", "eigh"), ("EKFAC", "eigh"), ("TEKFAC", "qr")]


def trained_on(name, basis, wrap=lambda model: model, part=slice(None)):
    """The network of the tests of many processes: layers of 10, 19 and 6 inputs."""
    model = two_processes.network()
    wrapped = wrap(model)
    options = {"damping": 0.1, "eigenbasis": basis, "input_rank": 3, **two_processes.INTERVALS}
    optimizer = getattr(optim, name)(wrapped, 0.05, **options)
    two_processes.run(wrapped, optimizer, part)
    return two_processes.result(model, optimizer)


def on_one_rank(rank, folder):
    """What each of two processes does, on its half of every batch; importable."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting = f"file://{folder}/meeting_point"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    half = two_processes.half_of(rank)
    results = {
        (name, basis): trained_on(name, basis, DistributedDataParallel, half)
        for name, basis in ON_RANKS
    }
    torch.save(results, f"{folder}/rank{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="no gloo"
)
def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    multiprocessing.spawn(on_one_rank, (str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert_same_bits(one, other)
    for name, basis in ON_RANKS:
        whole, halves = trained_on(name, basis), one[name, basis]
        for parameter, value in whole["model"].items():
            assert_close(halves["model"][parameter], value)
        for layer, curvature in whole["curvatures"].items():
            theirs = halves["curvatures"][layer]
            assert theirs["Q_in"].shape[1] == 3
            assert_close(theirs["eigenvalues"], curvature["eigenvalues"])
            assert_close(abs(theirs["Q_in"].T @ curvature["Q_in"]), np.eye(3))
