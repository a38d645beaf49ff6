"""If this fails, some kind of layer trains on the factors of a layer it is not."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from tekfac_edu import optim, reference
from tekfac_edu.optim import KFAC, TEKFAC, TKFAC, Added, Cost
from tekfac_edu.optim.layers import Layer, base
from tekfac_edu.optim.layers.linear import Linear

from .networks import CASES, batches, chosen, double_precision, one_layer
from .one_step import (
    CORRECTED,
    OBJECTIVES,
    after_one_step,
    every_basis,
    factors,
    gradients,
    rows,
)
from .oracles import (
    assert_close,
    by_group,
    cross_entropy,
    fisher_block,
    layer_rows,
    per_example_gradients,
    second_moments,
    vec,
)
from .training import EVERY_STEP, UNEVEN, every_method, train

DAMPING = 0.03
EMPIRICAL = OBJECTIVES["empirical"]
# a warning about a network that is all right is a fault too
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
IN_GROUPS = [case for case in CASES if "groups" in case.name or "depthwise" in case.name]


def random_matrix(module, a, g):
    """Like a gradient of the module."""
    draw = torch.Generator().manual_seed(5)
    shape = (*a.shape[:-3], g.shape[-1], a.shape[-1])
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def assert_preconditions_as_the_reference(optimizer, method, module, a, g):
    def expected(a, g, M):
        return getattr(reference, method.__name__).fit(a, g).precondition(M, DAMPING)

    M = random_matrix(module, a, g)
    assert_close(optimizer.precondition(module, M), by_group(module, expected, a, g, M.numpy()))


@every_case
def test_the_rows_of_the_oracle_make_the_gradients_of_autograd(case):
    model, batch = case.make(), case.batch()
    for name in case.layers:
        module, (a, g) = model.get_submodule(name), rows(case, name=name)
        G = per_example_gradients(model, module, EMPIRICAL, batch)
        summed = by_group(module, lambda a, g: np.einsum("snto,nti->snoi", g, a), a, g)
        assert_close(summed, G, rtol=1e-12)


@every_case
@every_method
def test_one_step_gives_the_preconditioner_of_the_reference(case, method):
    optimizer, _, _ = after_one_step(case, method, damping=DAMPING)
    for layer in optimizer.layers:
        assert_preconditions_as_the_reference(
            optimizer, method, layer.module, *rows(case, name=layer.name)
        )


@pytest.mark.parametrize("case", IN_GROUPS, ids=lambda case: case.name)
@every_method
def test_in_groups_it_is_so_with_several_vectors_per_example_too(case, method):
    optimizer, module, _ = after_one_step(case, method, "exact", damping=DAMPING)
    assert_preconditions_as_the_reference(optimizer, method, module, *rows(case, "exact"))


def dense_inverse(optimizer, module, *shape):
    """The preconditioner as a matrix: each column is vec of it applied to a unit matrix."""
    columns = []
    for place in np.ndindex(*shape[:-2], *shape[:-3:-1]):
        unit = torch.zeros(shape, dtype=torch.float64)
        unit[(*place[:-2], *place[:-3:-1])] = 1
        found = optimizer.precondition(module, unit).numpy().reshape(-1, *shape[-2:])
        columns.append(np.concatenate([vec(block) for block in found]))
    return np.stack(columns, axis=1)


def corrected_dense(G, S_in, S_out):
    """(Q_in ⊗ Q_out) diag(E[(Q_outᵀ G Q_in)²]) (Q_in ⊗ Q_out)ᵀ, bases from two factors."""
    Q_in, Q_out = np.linalg.eigh(S_in)[1], np.linalg.eigh(S_out)[1]
    Q = np.kron(Q_in, Q_out)
    return (Q * vec(second_moments(G, Q_in, Q_out))) @ Q.T


@pytest.mark.parametrize(
    "case",
    chosen("Linear", "Linear, used twice", "Conv2d, strided", "Conv2d, two groups, no bias"),
    ids=lambda case: case.name,
)
@every_method
def test_the_preconditioner_is_the_inverse_of_the_matrix_in_the_papers(case, method):
    """In groups it is block-diagonal, one block per group."""

    def matrix(a, g, G):
        S_in, S_out, scale = factors(method, a, g)
        if method in CORRECTED:
            return corrected_dense(G, S_in, S_out)
        return scale * np.kron(S_in, S_out)

    optimizer, module, _ = after_one_step(case, method, damping=Added(DAMPING))
    (a, g), G = rows(case), gradients(case)
    dim = G.shape[-2] * G.shape[-1]
    blocks = by_group(module, matrix, a, g, G).reshape(-1, dim, dim)
    size = len(blocks) * dim
    expected = np.zeros((size, size))
    for b, block in enumerate(blocks):
        here = slice(b * dim, (b + 1) * dim)
        expected[here, here] = block
    inverse = dense_inverse(optimizer, module, *G.shape[:-4], *G.shape[-2:])
    assert_close(inverse @ (expected + DAMPING * np.eye(size)), np.eye(size))
    trace = np.sum(by_group(module, lambda G: np.trace(fisher_block(G)), G))
    if method in CORRECTED or (method is TKFAC and a.shape[-2] == 1):
        assert_close(np.trace(expected), trace, rtol=1e-12)


class Apart(nn.Module):
    """The groups of a convolution as convolutions of their own."""

    def __init__(self, module):
        super().__init__()
        groups, channels = module.groups, module.in_channels // module.groups
        sizes = module.kernel_size, module.stride, module.padding, module.dilation
        self.each = nn.ModuleList(
            type(module)(channels, module.out_channels // groups, *sizes, bias=False)
            for _ in range(groups)
        )
        for part, weight in zip(self.each, module.weight.detach().chunk(groups), strict=True):
            part.weight = nn.Parameter(weight.clone())
        if module.bias is not None:
            for part, bias in zip(self.each, module.bias.detach().chunk(groups), strict=True):
                part.bias = nn.Parameter(bias.clone())

    def forward(self, x):
        parts = zip(self.each, x.chunk(len(self.each), 1), strict=True)
        return torch.cat([part(channels) for part, channels in parts], 1)

    def joined(self, name):
        return torch.cat([getattr(part, name) for part in self.each])


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("input_rank", [None, 3])
@pytest.mark.parametrize(
    "case",
    chosen(
        "Conv1d, two groups, strided, dilated, padded",
        "Conv2d, two groups, no bias",
        "Conv2d, two groups, one position",
        "Conv2d, two groups, everything differs by axis",
        "Conv2d, depthwise",
    ),
    ids=lambda case: case.name,
)
@every_basis
def test_groups_train_as_layers_of_their_own(case, method, eigenbasis, input_rank, fisher):
    cost = Cost(eigenbasis=eigenbasis, input_rank=input_rank)
    together, apart = case.make(), case.make()
    apart.layer = Apart(apart.layer)
    for model in (together, apart):
        # of the head's many inputs twelve examples give no unique basis
        options = {"damping": 0.1, "fisher": fisher, "cost": cost, "plain": ["head"], **UNEVEN}
        optimizer = method(model, 0.5, weight_decay=0.1, **options)
        train(model, optimizer, batches(case.shape, 5))
    start = case.make()
    for name, p in together.layer.named_parameters():
        before = start.layer.get_parameter(name)
        moved = (apart.layer.joined(name) - before).detach().numpy()
        assert_close(p - before, moved, rtol=1e-8)
    assert_close(together.head.weight, apart.head.weight.detach().numpy(), rtol=1e-8)


class Transposed(nn.Module):
    """A linear layer that holds its weight as (d_in, d_out)."""

    def __init__(self, linear):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().T.clone())
        self.bias = nn.Parameter(linear.bias.detach().clone())
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x):
        return nn.functional.linear(x, self.weight.T, self.bias)


@pytest.fixture
def transposed_kind():
    """What one file would hold; its class registers itself."""

    class TransposedLinear(Linear):
        @staticmethod
        def accepts(module):
            return isinstance(module, Transposed)

        def __init__(self, name, module, has_bias):
            super().__init__(name, module, has_bias)
            self.d_in, self.d_out = len(self.weight) + has_bias, self.weight.shape[1]
            self.shape = self.d_out, self.d_in

        def gradient(self):
            if self.weight.grad is None:
                return None
            return torch.cat([self.weight.grad.T, self.bias.grad[:, None]], 1)

        def parts(self, direction):
            return {self.weight: direction[:, :-1].T, self.bias: direction[:, -1]}

    yield TransposedLinear
    base.KINDS.remove(TransposedLinear)


@every_method
def test_a_new_kind_of_layer_is_one_class(method, transposed_kind):
    """It trains, bit for bit, as the kind whose weight it holds the other way round."""
    (case,) = chosen("Linear, positions")
    usual, other = case.make(), case.make()
    other.layer = Transposed(other.layer)
    for model in (usual, other):
        optimizer = method(model, 0.5, damping=0.1, fisher="exact", **UNEVEN)
        assert len(optimizer.layers) == 2
        train(model, optimizer, batches(case.shape, 4))
    assert torch.equal(other.layer.weight.T, usual.layer.weight)
    assert torch.equal(other.layer.bias, usual.layer.bias)
    assert torch.equal(other.head.weight, usual.head.weight)


def test_without_its_kind_a_module_is_left_to_plain_sgd():
    model = double_precision(lambda: nn.Sequential(Transposed(nn.Linear(4, 3)), nn.Linear(3, 3)))
    optimizer = KFAC(model, 0.1)
    assert [layer.name for layer in optimizer.layers] == ["1"]
    assert "no factorization for Transposed" in str(optimizer)


def test_a_kind_has_to_say_what_layers_cannot_know():
    layer = Layer("name", nn.Linear(2, 3), True)
    x = torch.ones(4, 2)
    for say in (layer.accepts, layer.batched, layer.positions, layer.inputs, layer.gradients):
        with pytest.raises(NotImplementedError):
            say(x)


def test_a_frozen_weight_stays_and_its_bias_takes_plain_steps():
    case = one_layer("frozen", (4,), nn.Linear, 4, 5, freeze=["weight"])
    pristine = case.make()
    cross_entropy(pristine, *case.batch()).backward()
    optimizer, module, _ = optimizer_of_plain(case)
    assert torch.equal(module.weight, pristine.layer.weight)
    plain = pristine.layer.bias - 0.25 * pristine.layer.bias.grad
    assert_close(module.bias, plain.detach().numpy(), rtol=1e-14)
    with pytest.raises(ValueError, match=r"layer|Linear"):
        optimizer.precondition(module, torch.zeros(5, 5, dtype=torch.float64))


def optimizer_of_plain(case):
    model, batch = case.make(), case.batch()
    optimizer = TEKFAC(model, 0.25, momentum=0.0, process_group=None, **EVERY_STEP)
    cross_entropy(model, *batch).backward()
    optimizer.step()
    return optimizer, model.layer, model


@pytest.mark.parametrize(
    "case",
    chosen("Conv2d, frozen bias", "Conv2d, two groups, frozen bias"),
    ids=lambda case: case.name,
)
def test_a_frozen_bias_stays(case):
    _, module, _ = after_one_step(case, TEKFAC, weight_decay=0.5)
    assert torch.equal(module.bias, case.make().layer.bias)
    assert not torch.equal(module.weight, case.make().layer.weight)


@pytest.mark.parametrize(
    ("shape", "layer"),
    [
        ((4,), lambda: nn.Linear(4, 3)),
        ((2, 5, 4), lambda: nn.Conv2d(2, 3, (5, 4))),
        ((3, 5, 4), lambda: nn.Conv2d(3, 3, (5, 4), groups=3)),
    ],
    ids=["Linear", "Conv2d", "depthwise"],
)
@every_method
def test_an_input_without_batch_axis_is_one_example(shape, layer, method):
    make = partial(double_precision, lambda: nn.Sequential(layer(), nn.Flatten(0)))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    label = torch.tensor(1)
    model, batched = make(), make()
    batched[1] = nn.Flatten()
    a, g = layer_rows(batched, batched[0], EMPIRICAL, [x[None], label[None]])
    optimizer = method(model, 0.01, damping=DAMPING, process_group=None, **EVERY_STEP)
    cross_entropy(model, x, label).backward()
    optimizer.step()
    assert_preconditions_as_the_reference(optimizer, method, model[0], a, g)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (partial(nn.Conv3d, 1, 1, 2), "of the convolutions, Conv1d and Conv2d are factored"),
        (partial(nn.ConvTranspose2d, 1, 1, 2), "of the convolutions, Conv1d and Conv2d are"),
        (partial(nn.Bilinear, 2, 2, 2), "its output is not linear in one input"),
    ],
    ids=["Conv3d", "transposed", "Bilinear"],
)
def test_what_cannot_be_factored_is_refused_by_name(layer, reason):
    make = partial(
        double_precision, lambda: nn.ModuleDict({"trunk": nn.Linear(2, 2), "odd": layer()})
    )
    with pytest.raises(ValueError, match=rf"odd.*{reason}.*plain=\['odd'\]"):
        optim.TEKFAC(make(), 0.1)
    optim.TEKFAC(make(), 0.1, plain=["odd"])


def test_calls_that_disagree_about_the_number_of_examples_are_refused():
    case = CASES[0]
    model, (x, y) = case.make(), case.batch()
    optimizer = optim.TEKFAC(model, 0.1, process_group=None)
    loss = cross_entropy(model, x, y) + cross_entropy(model, x[:4], y[:4])
    with pytest.raises(ValueError, match=r"\[7, 4\]|\[4, 7\]"):
        loss.backward()
        optimizer.step()
