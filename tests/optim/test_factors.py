"""If this fails, the factors are not the papers', and no method built on them is theirs."""

import pytest
import torch

from tekfac_edu.optim import factors
from tekfac_edu.optim.factors import (
    KFACFactors,
    TraceRestrictedFactors,
    averaged,
    kfac_factors,
    layer_format,
    trace_restricted_factors,
)

from .networks import gaussian
from .oracles import assert_close, factors_of_independence, trace_restricted_numerators

FORMULAS = [kfac_factors, trace_restricted_factors]
every_formula = pytest.mark.parametrize("formula", FORMULAS, ids=lambda f: f.__name__)
SHAPES = {  # of a and g
    "no positions": ((9, 4), (9, 3)),
    "no positions, two vectors": ((9, 4), (2, 9, 3)),
    "positions": ((5, 6, 4), (5, 6, 3)),
    "positions, three vectors": ((5, 6, 4), (3, 5, 6, 3)),
    "one of each": ((1, 1, 1), (1, 1, 1, 1)),
}
every_shape = pytest.mark.parametrize("shape", SHAPES)


def draw(shape):
    """Rows of uneven size, so that an example's own traces are not those of the mean."""
    a, g = (gaussian(*sizes, seed=seed) for seed, sizes in enumerate(SHAPES[shape]))
    size = torch.linspace(0.1, 2, len(a), dtype=torch.float64)
    return a * size.reshape(-1, *[1] * (a.ndim - 1)), g


def by_loops(formula, a, g):
    """The fields, from the format of layers."""
    a, g = (t.numpy() for t in layer_format(a, g))
    if formula is kfac_factors:
        return factors_of_independence(a, g)
    return trace_restricted_numerators(a, g)


@every_shape
@every_formula
def test_factors_are_those_of_loops_over_examples_and_positions(formula, shape):
    a, g = draw(shape)
    for ours, theirs in zip(formula(a, g), by_loops(formula, a, g), strict=True):
        assert_close(ours, theirs, rtol=1e-12)


@every_shape
def test_both_kinds_say_their_sides_and_their_scale(shape):
    a, g = draw(shape)
    A, G = by_loops(kfac_factors, a, g)
    delta, left, right = by_loops(trace_restricted_factors, a, g)
    independence, restricted = (formula(a, g) for formula in FORMULAS)
    for ours, theirs in (
        (independence.S_in, A),
        (independence.S_out, G),
        (independence.scale, 1.0),
        (restricted.S_in, left / delta),
        (restricted.S_out, right / delta),
        (restricted.scale, delta),
        (restricted.Phi.trace(), 1.0),
        (restricted.Psi.trace(), 1.0),
    ):
        assert_close(ours, theirs, rtol=1e-12)


def test_traces_are_taken_example_by_example_not_of_batch_means():
    """With δ = tr A · tr G, Φ = A / tr A, Ψ = G / tr G the product is KFAC's, whatever its name."""
    A, G = kfac_factors(*draw("no positions"))
    delta, delta_Phi, delta_Psi = trace_restricted_factors(*draw("no positions"))
    assert abs(delta / (A.trace() * G.trace()) - 1) > 0.2
    assert (delta_Phi / delta - A / A.trace()).norm() > 0.05
    assert (delta_Psi / delta - G / G.trace()).norm() > 0.05


@every_formula
def test_factors_of_many_blocks_at_once_are_those_of_each(formula):
    a, g = gaussian(2, 5, 6, 4), gaussian(2, 3, 5, 6, 3, seed=1)
    together = torch.vmap(formula)(a, g)
    for b in range(2):
        alone = formula(a[b], g[b])
        for name in (*alone._fields, "S_in", "S_out", "scale"):
            assert_close(getattr(together, name)[b], getattr(alone, name), rtol=1e-12)


@every_formula
@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
def test_averages_are_field_by_field_and_of_numerators(formula, decay):
    old, new = formula(*draw("no positions")), formula(*(2 * x for x in draw("positions")))
    found = averaged(old, new, decay)
    assert type(found) is type(old)
    for y, x, z in zip(old, new, found, strict=True):
        assert_close(z, decay * y + (1 - decay) * x, rtol=1e-14)


@every_formula
def test_a_mean_over_chunks_of_a_batch_is_that_of_the_batch(formula):
    a, g = draw("positions")
    whole, first, other = formula(a, g), formula(a[:2], g[:2]), formula(a[2:], g[2:])
    for x, y, z in zip(first, other, whole, strict=True):
        assert_close((2 * x + 3 * y) / 5, z, rtol=1e-12)


@pytest.mark.parametrize("blocks", [(), (2,)], ids=["one", "blocks"])
def test_without_any_gradient_trace_restricted_factors_are_even(blocks):
    """In the block that has none; the other one keeps its own."""
    delta = torch.zeros(blocks, dtype=torch.float64)
    numerators = [torch.zeros(*blocks, d, d, dtype=torch.float64) for d in (4, 3)]
    if blocks:
        delta[1] = 8.0
        for numerator in numerators:
            numerator[1, 0, 0] = 8.0
    found = TraceRestrictedFactors(delta, *numerators)
    for S in (found.Phi, found.Psi):
        even = torch.eye(S.shape[-1], dtype=torch.float64) / S.shape[-1]
        assert torch.equal(S[0] if blocks else S, even)
        assert not blocks or (S[1, 0, 0], S[1].sum()) == (1, 1)


def test_even_factors_leave_their_numerators_alone():
    factors = TraceRestrictedFactors(torch.zeros(()), torch.zeros(4, 4), torch.zeros(3, 3))
    assert factors.Phi.any() and not factors.delta_Phi.any()


@pytest.mark.parametrize(
    ("a", "g"),
    [((4,), (4,)), ((5, 4), (6, 3)), ((5, 2, 4), (5, 3, 3)), ((5, 4), (2, 2, 5, 3))],
    ids=str,
)
@every_formula
def test_rows_that_do_not_match_are_refused_with_their_shapes(formula, a, g):
    with pytest.raises(ValueError, match=r"a and g|a must be.*\(4,\)|a must be.*\(2, 2, 5, 3\)"):
        formula(torch.ones(a), torch.ones(g))


@pytest.mark.parametrize(("columns", "rows"), [(1, 40), (4, 40), (7, 40), (7, 13), (16, 100)])
@pytest.mark.parametrize("by_columns", [False, True])
def test_halves_of_a_product_make_the_whole(monkeypatch, columns, rows, by_columns):
    a = gaussian(rows, columns)
    whole = sum(torch.outer(row, row) for row in a)
    a = a.T.contiguous().T if by_columns else a
    monkeypatch.setattr(factors, "SPLIT", 2)
    assert_close(factors._gram(a), whole, rtol=1e-12)


def test_a_layer_wider_than_the_threshold():
    """The rule as it is used, on both sides of the seam between the halves."""
    width = factors.SPLIT + 88
    a, g = gaussian(1300, width), gaussian(1300, 3, seed=1)
    seam = [0, 1, width // 2 - 1, width // 2, width // 2 + 1, width - 1]
    expected = sum(torch.outer(row, row) for row in a[:, seam]) / len(a)
    A = kfac_factors(a, g).A
    assert_close(A[seam][:, seam], expected, rtol=1e-12)
    assert A.shape == (width, width)


def test_factors_are_plain_tuples_of_tensors():
    """Chunks and processes are summed, and states are held, field by field."""
    assert KFACFactors._fields == ("A", "G")
    assert TraceRestrictedFactors._fields == ("delta", "delta_Phi", "delta_Psi")
