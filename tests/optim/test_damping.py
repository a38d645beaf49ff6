"""If this fails, a layer is damped by another λ than its paper, its rule or its group says."""

import numpy as np
import pytest
import torch

from tekfac_edu.optim import (
    EKFAC,
    KFAC,
    TEKFAC,
    TKFAC,
    Added,
    ByTrace,
    Paper,
    kfac_damping,
    kfac_pi,
)
from tekfac_edu.optim.damping import RULES, rule_from
from tekfac_edu.optim.eigenvalues import FactorEigenvalues, MeasuredEigenvalues

from .networks import NETWORKS, batches, chosen, gaussian
from .one_step import after_one_step, curvatures_of, run
from .oracles import assert_close, vec
from .training import every_method, train

DAMPING = 0.03
numbers = torch.tensor


@pytest.mark.parametrize("mean_in", [1e-30, 2.0, 1e12])
@pytest.mark.parametrize("mean_out", [1e-30, 5.0])
def test_pi_splits_the_damping_and_makes_up_for_unlike_sides(mean_in, mean_out):
    pi = kfac_pi(numbers(mean_in).double(), numbers(mean_out).double())
    assert pi == pytest.approx((mean_in / mean_out) ** 0.5, rel=1e-6)
    means = numbers(mean_in).double(), numbers(mean_out).double()
    add_in, add_out = kfac_damping(*means, DAMPING)
    assert add_in * add_out == pytest.approx(DAMPING, rel=1e-12)
    # what is added stands in one proportion to both means
    assert add_in / mean_in == pytest.approx(float(add_out) / mean_out, rel=1e-6)


@pytest.mark.parametrize(("mean_in", "mean_out"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_pi_is_one_where_a_side_is_zero(mean_in, mean_out):
    assert kfac_pi(numbers(mean_in), numbers(mean_out)) == 1
    add_in, add_out = kfac_damping(numbers(mean_in), numbers(mean_out), 0.25)
    assert (add_in, add_out) == (0.5, 0.5)


def test_pi_of_blocks_is_of_each():
    means = numbers([4.0, 0.0, 9.0]), numbers([1.0, 2.0, 0.0])
    assert torch.equal(kfac_pi(*means), numbers([2.0, 1.0, 1.0]))
    assert torch.equal(kfac_damping(*means, 1.0)[1], numbers([0.5, 1.0, 1.0]))


def test_pi_does_not_overflow_in_float32():
    assert kfac_pi(numbers(1e-38), numbers(1e38)) == pytest.approx(1e-38, rel=1e-5)


def sides(*blocks):
    """Positive definite S_in and S_out, and their eigenvalues as a curvature has them."""
    X, Y = gaussian(*blocks, 9, 5), gaussian(*blocks, 9, 3, seed=1)
    S_in, S_out = X.mT @ X, 0.1 * Y.mT @ Y
    s = [torch.linalg.eigvalsh(S) for S in (S_in, S_out)]
    return S_in, S_out, FactorEigenvalues(*s, *(each.mean(-1) for each in s))


@pytest.mark.parametrize("blocks", [(), (2,)], ids=["one", "blocks"])
def test_each_paper_s_damped_eigenvalues_are_those_of_its_damped_matrix(blocks):
    S_in, S_out, eigenvalues = sides(*blocks)
    measured = MeasuredEigenvalues(gaussian(*blocks, 3, 5).square())
    rule, root = Paper(1.0), DAMPING**0.5
    found = {m: rule.damped(m, eigenvalues, DAMPING) for m in (KFAC, TKFAC)}
    for method in (EKFAC, TEKFAC):
        assert torch.equal(rule.damped(method, measured, DAMPING), measured.D + DAMPING)
    for block in np.ndindex(*blocks):
        left, right = S_in[block].numpy(), S_out[block].numpy()
        pi = np.sqrt(np.trace(left) / 5 / (np.trace(right) / 3))
        for method, p in ((KFAC, pi), (TKFAC, 1.0)):
            damped = np.kron(left + p * root * np.eye(5), right + root / p * np.eye(3))
            ours = np.sort(vec(found[method][block].numpy()))
            assert_close(ours, np.linalg.eigvalsh(damped))


@every_method
def test_added_is_the_same_for_all_methods(method):
    _, _, eigenvalues = sides(2)
    found = Added(1.0).damped(method, eigenvalues, DAMPING)
    assert torch.equal(found, eigenvalues.D + DAMPING)


TAU, FLOOR = 3.0, 1e-9


@pytest.mark.parametrize("network", ["convolutions", "groups"])
@every_method
def test_by_trace_a_convolution_has_its_own_and_dense_layers_a_share_of_the_largest(
    method, network
):
    """TEKFAC (3.5): τ tr D_l / dim; of a convolution in groups over all its groups."""
    rule = ByTrace(0.5, multiplier=TAU, floor=FLOOR)
    _, optimizer = run(method, network, steps=2, damping=rule)
    found = {layer.name: damping for layer, damping in optimizer.dampings().items()}
    expected, dense = {}, []
    for name, curvature in curvatures_of(optimizer).items():
        D = curvature.eigenvalues.D.numpy()
        if curvature.layer.module.weight.ndim > 2:
            expected[name] = TAU * D.sum() / D.size
        else:
            dense.append(name)
    assert dense and len(expected) >= 2
    expected |= {name: 0.5 * max(expected.values()) for name in dense}
    assert found == pytest.approx(expected, rel=1e-12)


@every_method
def test_inside_a_layer_by_trace_is_each_paper_s_own(method):
    (case,) = chosen("Conv2d, two groups")
    optimizer, module, curvature = after_one_step(case, method, damping=ByTrace(0.5))
    M = gaussian(*curvature.layer.shape)
    damping = float(curvature.eigenvalues.D.mean())
    other, again, _ = after_one_step(case, method, damping=Paper(damping))
    assert_close(optimizer.precondition(module, M), other.precondition(again, M))


@every_method
def test_by_trace_traces_below_the_floor_count_as_the_floor(method):
    _, optimizer = run(method, "convolutions", steps=1, damping=ByTrace(0.5, floor=1e6))
    dims = {layer.name: np.prod(layer.shape) for layer in optimizer.layers}
    found = {layer.name: float(d) for layer, d in optimizer.dampings().items()}
    own = {name: 1e6 / dims[name] for name in ("0", "3")}
    assert found == pytest.approx(own | {"7": 0.5 * max(own.values())}, rel=1e-12)


@pytest.mark.parametrize("rule", [Paper, Added])
def test_other_rules_give_each_layer_the_damping_of_its_group(rule):
    make, _ = NETWORKS["dense"]
    model = make()
    groups = [{"params": list(model[2].parameters()), "damping": 0.7}]
    optimizer = TEKFAC(model, 0.1, damping=rule(0.2), param_groups=groups)
    assert list(optimizer.dampings().values()) == [0.2, 0.7]


@pytest.mark.parametrize("network", ["dense", "convolutions"])
def test_by_trace_without_any_trace_is_the_group_s_own(network):
    """No convolution, or none that has taken a step."""
    make, _ = NETWORKS[network]
    model = make()
    groups = [{"params": list(model[0].parameters()), "damping": 0.7}]
    optimizer = TEKFAC(model, 0.1, damping=ByTrace(0.2), param_groups=groups)
    first, *others = optimizer.dampings().values()
    assert first == 0.7 and set(others) == {0.2}


def test_by_trace_a_dense_layer_s_share_is_its_group_s():
    make, shape = NETWORKS["convolutions"]
    model = make()
    groups = [{"params": list(model[-1].parameters()), "damping": 0.7}]
    optimizer = TEKFAC(model, 0.1, damping=ByTrace(0.2), param_groups=groups)
    train(model, optimizer, batches(shape, 1))
    *convolutions, dense = optimizer.dampings().values()
    assert float(dense) == pytest.approx(0.7 * float(max(convolutions)), rel=1e-12)


def test_a_number_means_the_papers_and_a_rule_itself():
    assert rule_from(0.3) == Paper(0.3)
    assert rule_from(Added(0.3)) == Added(0.3) != Paper(0.3)
    assert {name: rule(0.3) for name, rule in RULES.items()} == {
        "Paper": Paper(0.3),
        "Added": Added(0.3),
        "ByTrace": ByTrace(0.3, multiplier=1.0, floor=1e-8),
    }


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "1", None, True])
@pytest.mark.parametrize("name", ["damping", "multiplier", "floor"])
def test_what_is_no_damping_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        ByTrace(**({"damping": 1.0} | {name: value}))
    if name == "damping":
        for rule in (Paper, Added, rule_from):
            with pytest.raises(ValueError, match="damping"):
                rule(value)
