"""If this fails, the reference and the PyTorch half call one thing by two names, or two by one.

`tekfac_edu/reference/X.py` and `tekfac_edu/optim/X.py` say the same; here their names are compared,
and what they compute, in float64.
"""

import inspect
from importlib import import_module

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tekfac_edu import optim, reference  # noqa: E402
from tekfac_edu.optim.layers import factored_layer  # noqa: E402

FILES = ["factors", "eigenbasis", "eigenvalues", "damping", "curvature"]
# What only the PyTorch half has, and why.
ALONE = {
    "factors": {
        "layer_format": "one format for all shapes; the reference has it in inputs.py",
        "Formula": "a statistic in two ways, for whichever is cheaper",
        "factors_of_gradients": "the second way of `summed_factors`",
    },
    "eigenbasis": {"DecompositionFailed": "training goes on when LAPACK does not"},
    "eigenvalues": {
        "FactorEigenvalues": "tensors to be held and sent; in the reference, the methods' fields",
        "MeasuredEigenvalues": "the same",
        "eigenvalues_of_gradients": "of gradients that were formed without patches",
        "projecting_first_is_cheaper": "what is formed first is a matter of speed",
    },
    "damping": {"rule_from": "the constructor's bare number; the reference has it in descent.py"},
    "curvature": {
        "Decomposition": "what one process sends to the others",
        "preconditioned": "layers of one shape are preconditioned together",
    },
}
METHODS = ["KFAC", "EKFAC", "TKFAC", "TEKFAC"]
every_method = pytest.mark.parametrize("method", METHODS)
every_file = pytest.mark.parametrize("name", FILES)
PAPER, ADDED, BY_TRACE = "Paper", "Added", "ByTrace"


def modules(name):
    return (import_module(f"tekfac_edu.{house}.{name}") for house in ("reference", "optim"))


def defined_in(module):
    """Functions and classes that a file defines for others: {name: it}."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    }


@every_file
def test_a_file_and_its_mirror_define_the_same_names(name):
    theirs, ours = map(defined_in, modules(name))
    assert set(ours) - set(theirs) == set(ALONE[name])
    assert set(theirs) <= set(ours)


@every_file
def test_functions_of_one_name_take_the_same_arguments(name):
    """The PyTorch half may have one more, behind the others and with a default."""
    theirs, ours = map(defined_in, modules(name))
    for function in filter(inspect.isfunction, theirs.values()):
        wanted = list(inspect.signature(function).parameters)
        found = inspect.signature(ours[function.__name__]).parameters
        assert list(found)[: len(wanted)] == wanted
        assert all(p.default is not p.empty for p in list(found.values())[len(wanted) :])


@every_method
def test_a_method_s_page_says_factors_eigenvalues_and_damped_in_both_houses(method):
    theirs, ours = (
        getattr(import_module(f"tekfac_edu.{house}.{method.lower()}"), method)
        for house in ("reference", "optim")
    )
    for page in (theirs, ours):
        assert {"factors", "damped"} <= set(vars(page))
        assert "eigenvalues" in {**vars(page), **vars(page).get("__annotations__", {})}
    assert theirs.factors.__name__ == ours.factors.__name__


@pytest.mark.parametrize("verb", ["average_factors", "turn_to", "average_eigenvalues"])
def test_curvatures_have_the_same_verbs(verb):
    assert all(callable(getattr(module.LayerCurvature, verb)) for module in modules("curvature"))


@pytest.mark.parametrize("rule", [PAPER, ADDED, BY_TRACE])
def test_rules_of_damping_have_the_same_fields_and_verbs(rule):
    theirs, ours = (getattr(house, rule) for house in (reference, optim))
    assert inspect.signature(theirs) == inspect.signature(ours)
    for name in ("layer_dampings", "damped"):
        assert callable(getattr(theirs, name)) and callable(getattr(ours, name))


# what they compute


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def orthogonal(d, seed=0):
    return np.linalg.qr(draw(d, d, seed=seed))[0]


def assert_equal(ours, theirs):
    """To rounding, relative to the largest entry."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == np.float64
    assert abs(ours - theirs).max() <= 1e-10 * abs(theirs).max()


SHAPES = {
    "no positions": ((9, 4), (9, 3)),
    "no positions, two vectors": ((9, 4), (2, 9, 3)),
    "positions": ((9, 2, 4), (9, 2, 3)),
    "many positions, two vectors": ((5, 8, 4), (2, 5, 8, 3)),
}
every_shape = pytest.mark.parametrize("shape", SHAPES)


def rows(shape, seed=0):
    """a and g of uneven size, of examples and of sides."""
    a, g = (draw(*sizes, seed=seed + i) for i, sizes in enumerate(SHAPES[shape]))
    return a * np.linspace(0.2, 2, len(a)).reshape(-1, *[1] * (a.ndim - 1)), 0.3 * g


def tensors(*arrays):
    return [torch.tensor(array) for array in arrays]


@every_shape
@pytest.mark.parametrize("name", ["kfac_factors", "trace_restricted_factors", "summed_factors"])
def test_factors_and_their_averages_are_equal(name, shape):
    ours, theirs = getattr(optim, name), getattr(reference, name)
    old, new = rows(shape), rows(shape, seed=7)
    found = ours(*tensors(*old)), ours(*tensors(*new))
    expected = theirs(*old), theirs(*new)
    averages = (
        import_module("tekfac_edu.optim.factors").averaged(*found, 0.7),
        reference.averaged(*expected, 0.7),
    )
    for one, other in (*zip(found, expected, strict=True), averages):
        for word in ("S_in", "S_out", "scale"):
            assert_equal(getattr(one, word), np.float64(getattr(other, word)))


@every_shape
def test_corrected_eigenvalues_are_equal_and_move_alike(shape):
    a, g = rows(shape)
    old, new = ((orthogonal(4, seed), orthogonal(3, seed)) for seed in (1, 2))
    D = reference.corrected_eigenvalues(a, g, *old)
    assert_equal(optim.corrected_eigenvalues(*tensors(a, g, *old)), D)
    moved = optim.move_eigenvalues(*tensors(D, *old, *new))
    assert_equal(moved, reference.move_eigenvalues(D, *old, *new))


def test_bases_and_qr_iterations_are_equal():
    S, Q = draw(9, 5).T @ draw(9, 5), orthogonal(5)
    (s, V), (values, vectors) = optim.eigenbasis(torch.tensor(S)), reference.eigenbasis(S)
    assert_equal(s, values)
    assert_equal(abs(V), abs(vectors))
    found = optim.qr_iteration(*tensors(S, Q))
    assert_equal(found, reference.qr_iteration(S, Q))


def test_directions_are_equal_in_any_basis():
    M, D, Q_in, Q_out = draw(3, 4), draw(3, 4) ** 2 + 0.1, orthogonal(4), orthogonal(3)
    precondition = import_module("tekfac_edu.optim.eigenbasis").precondition
    found = precondition(*tensors(M, Q_in, Q_out, D))
    assert_equal(found, reference.precondition(M, Q_in, Q_out, D))


@pytest.mark.parametrize("means", [(2.0, 5.0), (1e-9, 3.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_the_split_of_the_damping_is_equal(means):
    ours = [torch.tensor(mean, dtype=torch.float64) for mean in means]
    assert_equal(optim.kfac_pi(*ours), np.float64(reference.kfac_pi(*means)))
    pairs = zip(optim.kfac_damping(*ours, 0.3), reference.kfac_damping(*means, 0.3), strict=True)
    for one, other in pairs:
        assert_equal(one, np.float64(other))


def curvatures(method, shape, steps=4, eigenbasis="eigh", decay=0.7):
    """Both houses' curvature of one layer after the same batches; all three turn every step."""
    theirs = reference.LayerCurvature(getattr(reference, method), decay, eigenbasis)
    module = torch.nn.Linear(4, 3, bias=False) if "no " in shape else torch.nn.Conv1d(4, 3, 1)
    layer = factored_layer("name", module.double(), False)
    ours = import_module("tekfac_edu.optim.curvature").LayerCurvature(
        layer, getattr(optim, method), optim.Cost(eigenbasis=eigenbasis)
    )
    for step in range(steps):
        a, g = rows(shape, seed=10 * step)
        theirs.average_factors(a, g)
        theirs.turn_to(theirs.factors)
        theirs.average_eigenvalues(a, g)
        a, g = tensors(a, g)
        ours.average_factors(ours.method.factors(a, g), decay)
        ours.turn_to(ours.decompose(), step)
        if method in ("EKFAC", "TEKFAC"):
            new = optim.corrected_eigenvalues(a, g, *ours.basis)
            ours.average_eigenvalues(new, decay, step)
    return ours, theirs


WAYS = [*((method, "eigh") for method in METHODS), ("EKFAC", "qr"), ("TEKFAC", "qr")]


@pytest.mark.parametrize(("method", "eigenbasis"), WAYS)
@pytest.mark.parametrize("rule", [PAPER, ADDED, BY_TRACE])
@every_shape
def test_after_some_batches_eigenvalues_dampings_and_directions_are_equal(
    method, eigenbasis, rule, shape
):
    ours, theirs = curvatures(method, shape, eigenbasis=eigenbasis)
    rules = [getattr(house, rule)(0.3) for house in (optim, reference)]
    assert_equal(ours.eigenvalues.D, theirs.approximation.eigenvalues)
    (damping,) = rules[1].layer_dampings([theirs])
    found = rules[0].layer_dampings({ours.layer: 0.3}, {ours.layer: ours})
    assert_equal(np.float64(found[ours.layer]), np.float64(damping))
    damped = rules[0].damped(ours.method, ours.eigenvalues, damping)
    expected = rules[1].damped(theirs.approximation, damping)
    assert_equal(damped, expected)
    M = draw(3, 4, seed=5)
    direction = ours.basis.precondition(torch.tensor(M), *ours.basis, damped)
    basis = theirs.approximation.Q_in, theirs.approximation.Q_out
    assert_equal(direction, reference.precondition(M, *basis, expected))
