"""If this fails, "exact" and "mc" train on some other matrix than the model's own Fisher."""

import numpy as np
import pytest
import torch
from torch import nn

from tekfac_edu import reference
from tekfac_edu.optim import EKFAC, KFAC, TEKFAC, Added

from .networks import CASES, CLASSES, mlp
from .oracles import (
    assert_close,
    cross_entropy,
    fisher_block,
    half_squared_error,
    layer_rows,
    objectives_bernoulli,
    objectives_categorical,
    objectives_gaussian,
    per_example_gradients,
)
from .training import EVERY_STEP, every_method, seeded

DAMPING = 0.03
OBJECTIVES = {
    "categorical": objectives_categorical,
    "bernoulli": objectives_bernoulli,
    "gaussian": objectives_gaussian,
}
LIKELIHOODS = list(OBJECTIVES)
PREDICTED = {
    "categorical": lambda z: torch.softmax(z, 1),
    "bernoulli": torch.sigmoid,
    "gaussian": lambda z: z,
}
SHOWN = [
    "Linear",
    "Linear, positions",
    "Linear, in-place ReLU after it",
    "Conv1d, strided, dilated, padded",
    "Conv2d, same, even kernel",
    "Linear, used twice",
    "Conv2d, used on two sizes of picture",
    "two calls of the network in one loss",
]
# a warning about a network that is all right is a fault too
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
every_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS)
every_sampled = pytest.mark.parametrize("fisher", ["mc", "exact"])


def optimizer_for(model, method=TEKFAC, fisher="exact", seed=0, **options):
    settings = {"damping": DAMPING, "process_group": None} | EVERY_STEP
    with seeded(seed):
        return method(model, 3e-4, fisher=fisher, **settings | options)


def fisher_step(optimizer, model, x, y, likelihood="categorical"):
    """One ordinary step with the call between forward and backward; the loss is cross-entropy."""
    outputs = model(x)
    optimizer.accumulate_fisher(outputs, likelihood=likelihood)
    nn.functional.cross_entropy(outputs, y).backward()
    optimizer.step()


@pytest.mark.parametrize("name", SHOWN)
@every_likelihood
@every_method
def test_exact_is_the_sum_over_classes(name, likelihood, method):
    (case,) = [case for case in CASES if case.name == name]
    model, pristine, batch = case.make(), case.make(), case.batch()
    optimizer = optimizer_for(model, method)
    fisher_step(optimizer, model, *batch, likelihood)
    for layer in case.layers:
        module = pristine.get_submodule(layer)
        a, g = layer_rows(pristine, module, OBJECTIVES[likelihood], batch)
        assert len(g) == CLASSES * (2 if likelihood == "bernoulli" else 1)
        M = torch.randn(g.shape[-1], a.shape[-1], generator=torch.Generator().manual_seed(4))
        M = M.double()
        expected = getattr(reference, method.__name__).fit(a, g).precondition(M.numpy(), DAMPING)
        assert_close(optimizer.precondition(model.get_submodule(layer), M), expected)


@every_likelihood
def test_exact_does_not_look_at_labels(likelihood):
    case = CASES[0]
    x, y = case.batch()
    M = torch.ones(5, 5, dtype=torch.float64)
    seen = []
    for labels in (y, (y + 1) % CLASSES):
        model = case.make()
        optimizer = optimizer_for(model)
        fisher_step(optimizer, model, x, labels, likelihood)
        seen.append(optimizer.precondition(model.layer, M))
    assert torch.equal(*seen)


COPIES, DRAWS_OF = 1500, 4
DEVIATIONS = 5.0  # two-sided, one in 1.7 million for each of the few dozen numbers below


def estimated_blocks(likelihood, module_index, seed):
    """KFAC's A ⊗ G from one step whose batch repeats a few examples many times, by its inverse.

    Also each distinct example's own exact vectors. With A known, G is an average of as many
    independent draws as the batch has examples.
    """
    model, pristine = mlp(), mlp()
    x = torch.randn(DRAWS_OF, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    many = x.repeat(COPIES, 1)
    optimizer = optimizer_for(model, KFAC, "mc", seed, damping=Added(DAMPING))
    fisher_step(optimizer, model, many, torch.zeros(len(many), dtype=torch.long), likelihood)
    a, g = layer_rows(pristine, pristine[module_index], OBJECTIVES[likelihood], [x])
    d_in, d_out = a.shape[-1], g.shape[-1]
    columns = []
    for j, i in np.ndindex(d_in, d_out):
        unit = torch.zeros(d_out, d_in, dtype=torch.float64)
        unit[i, j] = 1
        applied = optimizer.precondition(model[module_index], unit)
        columns.append(applied.numpy().flatten(order="F"))
    product = np.linalg.inv(np.stack(columns, 1)) - DAMPING * np.eye(d_in * d_out)
    A = np.einsum("nti,ntj->ij", a, a) / len(a)
    blocks = product.reshape(d_in, d_out, d_in, d_out)
    G = np.einsum("ij,iojp->op", A, blocks) / np.sum(A**2)
    assert_close(np.kron(A, G), product, rtol=1e-9)
    return G, g[:, :, 0]


def moments_of_one_draw(g, likelihood, probabilities):
    """Mean and variance of (g gᵀ)_op over the random label, for one example: two matrices.

    g (C, d): √p_c ∂(−log p_c), or the gradients of the outputs, which a normal draw ε combines:
    (Σ_c ε_c g_c)_o is Gaussian, so its products have variance K_oo K_pp + K_op². Of coins g has two
    rows each, √p(y_c) ∂(−log p(y_c)) for y_c = 0 and 1; all 2^C labels are gone through.
    """
    K = g.T @ g
    if likelihood == "bernoulli":
        chance = np.stack([1 - probabilities, probabilities], 1)  # of y_c = 0 and 1: (C, 2)
        own = g.reshape(*chance.shape, -1) / np.sqrt(chance)[..., None]
        first, second = 0, 0
        for label in np.ndindex(*len(own) * (2,)):
            weight = np.prod([chance[c, y] for c, y in enumerate(label)])
            score = sum(own[c, y] for c, y in enumerate(label))
            first = first + weight * np.outer(score, score)
            second = second + weight * np.outer(score, score) ** 2
        np.testing.assert_allclose(first, K, atol=1e-12 * np.abs(K).max())
        return K, second - K**2
    if likelihood == "gaussian":
        return K, np.outer(np.diag(K), np.diag(K)) + K**2
    own = g / np.sqrt(probabilities)[:, None]
    products = np.einsum("co,cp->cop", own, own)
    return K, np.einsum("c,cop->op", probabilities, products**2) - K**2


@pytest.mark.parametrize("module_index", [0, 2], ids=["hidden", "outputs"])
@every_likelihood
def test_many_draws_average_to_exact(likelihood, module_index):
    G, g = estimated_blocks(likelihood, module_index, seed=11)
    model = mlp()
    x = torch.randn(DRAWS_OF, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    p = PREDICTED[likelihood](model(x)).detach().numpy()
    moments = [moments_of_one_draw(g[:, n], likelihood, p[n]) for n in range(DRAWS_OF)]
    mean = np.mean([mean for mean, _ in moments], axis=0)
    error = np.sqrt(np.sum([variance for _, variance in moments], axis=0) / COPIES) / DRAWS_OF
    assert (np.abs(G - mean) <= DEVIATIONS * error).all()
    # the bound is of the size that draws really scatter by: it is no wide open door
    assert (np.abs(G - mean) / error).max() > 0.5
    assert error.max() < 0.1 * np.abs(mean).max()


def test_one_draw_is_one_label_per_example():
    """With one example F̂ has rank one, and its trace is that of one of the classes."""
    model, pristine = mlp(), mlp()
    x, y = torch.ones(1, 4, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    optimizer = optimizer_for(model, EKFAC, "mc", seed=3)
    fisher_step(optimizer, model, x, y)
    columns = []
    for j, i in np.ndindex(5, 5):
        unit = torch.zeros(5, 5, dtype=torch.float64)
        unit[i, j] = 1
        columns.append(optimizer.precondition(model[0], unit).numpy().flatten(order="F"))
    F = np.linalg.inv(np.stack(columns, 1)) - DAMPING * np.eye(25)
    candidates = [
        fisher_block(
            per_example_gradients(
                pristine,
                pristine[0],
                lambda net, x, label=label: [cross_entropy(net, x, torch.tensor([label]))],
                [x],
            )
        )
        for label in range(CLASSES)
    ]
    distances = [np.abs(F - candidate).max() / np.abs(F).max() for candidate in candidates]
    assert min(distances) < 1e-10


def sent_back(optimizer, model, x, likelihood="categorical"):
    """The sampled vectors of one call, as the last layer saw them."""
    optimizer.accumulate_fisher(model(x), likelihood=likelihood)
    last = [use for use in optimizer.capture.uses if use.layer.module is model[-1]]
    return last[-1].gradients[-1]


@every_likelihood
def test_samples_are_decided_by_seed_step_and_part_alone(likelihood):
    """And by the rank (test_distributed); not by what else draws, nor by how often it is asked."""
    model, x = mlp(), CASES[0].batch()[0].repeat(30, 1)
    optimizer = optimizer_for(model, fisher="mc", seed=1)
    state = torch.get_rng_state()
    first, second_part = (sent_back(optimizer, model, x, likelihood) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    optimizer.zero_grad()
    torch.rand(1)
    assert torch.equal(first, sent_back(optimizer, model, x, likelihood))
    assert torch.equal(second_part, sent_back(optimizer, model, x, likelihood))
    same = optimizer_for(model, fisher="mc", seed=1)
    assert torch.equal(first, sent_back(same, model, x, likelihood))
    other = optimizer_for(model, fisher="mc", seed=2)
    optimizer.zero_grad()
    optimizer.steps += 1
    later = sent_back(optimizer, model, x, likelihood)
    for vectors in (second_part, later, sent_back(other, model, x, likelihood)):
        assert not torch.equal(first, vectors)
    assert not torch.equal(second_part, later)
    torch.set_rng_state(state)


@every_likelihood
@every_sampled
def test_gradients_are_those_of_a_run_without_the_call(fisher, likelihood):
    (case,) = [case for case in CASES if case.name == "Conv2d in the middle"]
    criterion = cross_entropy if likelihood == "categorical" else half_squared_error
    x, labels = case.batch()
    y = labels if likelihood == "categorical" else torch.eye(CLASSES).double()[labels]
    plain, model = case.make(), case.make()
    criterion(plain, x, y).backward()
    optimizer = optimizer_for(model, fisher=fisher)
    outputs = model(x)
    optimizer.accumulate_fisher(outputs, likelihood=likelihood)
    assert all(parameter.grad is None for parameter in model.parameters())
    criterion(lambda _: outputs, x, y).backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@every_sampled
def test_gradients_that_are_there_already_stay(fisher):
    model = mlp()
    x, _ = CASES[0].batch()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer_for(model, fisher=fisher).accumulate_fisher(model(x))
    assert all((parameter.grad == 0.5).all() for parameter in model.parameters())
