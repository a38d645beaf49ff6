"""If this fails, the table says something else than what the preconditioner does."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tekfac_edu.optim import EKFAC, KFAC, TEKFAC, ByTrace, Cost

from .networks import CLASSES, batches, cnn, double_precision, mlp
from .training import EVERY_STEP, UNEVEN, backward, every_method, train


def spectrum(optimizer, module, d_out, d_in, damping):
    """D by asking: eigenvalues of M ↦ (F̂ + λ)⁻¹ M, inverted, less λ. For D + λ damping only."""
    units = torch.eye(d_out * d_in, dtype=torch.float64).reshape(-1, d_out, d_in)
    inverse = torch.stack([optimizer.precondition(module, unit).flatten() for unit in units])
    return 1 / np.linalg.eigvalsh(inverse.numpy())[::-1] - damping


@pytest.mark.parametrize("method", [EKFAC, TEKFAC])
def test_the_columns_are_those_of_the_preconditioner(method):
    model = mlp()
    damping = 0.02
    optimizer = method(model, 2e-3, damping=damping, **EVERY_STEP)
    train(model, optimizer, batches((4,), 3))
    backward(model, optimizer, *next(batches((4,), 1)))
    rows = {row.name: row for row in optimizer.report().rows}
    assert list(rows) == ["0", "2"]
    for name, (d_out, d_in) in {"0": (5, 5), "2": (3, 6)}.items():
        row, layer = rows[name], model.get_submodule(name)
        D = np.sort(spectrum(optimizer, layer, d_out, d_in, damping))
        assert (row.treatment, row.d_out, row.d_in) == ("factored", d_out, d_in)
        assert row.damping == damping
        assert row.largest == pytest.approx(D[-1], rel=1e-9)
        assert row.smallest == pytest.approx(D[0], abs=1e-9 * D[-1])
        assert row.median == pytest.approx(D[(len(D) - 1) // 2], abs=1e-9 * D[-1])
        assert row.swamped == pytest.approx(np.mean(damping > D))
        assert 0 < row.swamped < 1
        M = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
        direction = optimizer.precondition(layer, M)
        cosine = (direction * M).sum() / direction.norm() / M.norm()
        assert row.cosine == pytest.approx(cosine.item(), rel=1e-12)
        assert row.warning == ""


@every_method
def test_without_a_gradient_there_is_no_cosine(method):
    model = mlp()
    optimizer = method(model, 1e-3, **EVERY_STEP)
    train(model, optimizer, batches((4,), 2))
    assert all(row.cosine is not None for row in optimizer.report().rows)
    optimizer.zero_grad()
    assert all(row.cosine is None and row.warning == "" for row in optimizer.report().rows)


@every_method
def test_a_layer_that_runs_sgd_is_told_of_and_a_healthy_one_is_not(method):
    """A damping of 1e6 in a group of its own swamps one layer of two."""
    model = mlp()
    swamped = [{"params": list(model[2].parameters()), "damping": 1e6}]
    optimizer = method(model, 1e-4, damping=1e-2, param_groups=swamped, **EVERY_STEP)
    train(model, optimizer, batches((4,), 3))
    healthy, sgd = optimizer.report().rows
    assert healthy.warning == "" and healthy.cosine < 0.99 and healthy.swamped < 1
    assert "runs SGD" in sgd.warning and sgd.cosine > 0.9999 and sgd.swamped == 1
    assert sgd.damping == 1e6
    lines = str(optimizer.report()).splitlines()
    assert [line for line in lines if ": " in line] == [f"2: {sgd.warning}"]


@every_method
def test_a_zero_gradient_is_not_called_sgd(method):
    model = mlp()
    optimizer = method(model, 1e-4, **EVERY_STEP)
    train(model, optimizer, batches((4,), 1))
    for p in model.parameters():
        p.grad.zero_()
    assert all(row.warning == "" for row in optimizer.report().rows)


@every_method
def test_ages_are_steps_since_the_refresh(method):
    """Intervals 2, 3, 1. D of an uncorrected method changes with its basis, else each step."""
    model = mlp()
    optimizer = method(model, 1e-4, **UNEVEN)
    ages = []
    for batch in batches((4,), 7):
        train(model, optimizer, [batch])
        ages.append([(row.basis_age, row.eigenvalues_age) for row in optimizer.report().rows])
    basis = [0, 1, 2, 0, 1, 2, 0]
    eigenvalues = [0] * 7 if "eigenvalues" in method.stages() else basis
    assert ages == [[pair] * 2 for pair in zip(basis, eigenvalues, strict=True)]


@every_method
def test_the_table_of_a_run_is_there_again_when_it_is_resumed(method):
    model = mlp()
    optimizer = method(model, 1e-4, **UNEVEN)
    train(model, optimizer, batches((4,), 5))
    optimizer.zero_grad()
    resumed = mlp()
    resumed.load_state_dict(model.state_dict())
    again = method(resumed, 0.5)
    again.load_state_dict(optimizer.state_dict())
    assert again.report().rows == optimizer.report().rows
    assert {row.basis_age for row in again.report().rows} == {1}


def test_before_the_first_step_there_are_sizes_and_no_numbers():
    optimizer = KFAC(cnn(), 0.1)
    rows = {row.name: row for row in optimizer.report().rows}
    assert (rows["0"].d_out, rows["0"].d_in) == (2, 9)
    assert (rows["3"].d_out, rows["3"].d_in) == (3, 9)
    assert rows["1"].d_out is None and "BatchNorm2d" in rows["1"].treatment
    for row in rows.values():
        assert row.damping is row.largest is row.cosine is row.basis_age is None
    assert str(optimizer.report())


def everything_there_is():
    return double_precision(
        lambda: nn.ModuleDict(
            {
                "words": nn.Embedding(7, 4),
                "norm": nn.LayerNorm(4),
                "frozen": nn.Linear(4, 4).requires_grad_(False),
                "partly": nn.Linear(4, 4),
                "plain": nn.Linear(4, 4),
                "silent": nn.Tanh(),
                "head": nn.Linear(4, CLASSES),
            }
        )
    )


def run_through(model, steps=2):
    model["partly"].bias.requires_grad_(False)
    optimizer = TEKFAC(model, 1e-3, plain=["plain"], **EVERY_STEP)
    for _ in range(steps):
        x = torch.arange(7)
        for name in ("words", "norm", "frozen", "partly", "silent", "plain", "head"):
            x = model[name](x)
        optimizer.zero_grad()
        functional.cross_entropy(x, torch.arange(7) % CLASSES).backward()
        optimizer.step()
    return optimizer


EXPECTED = {
    "words": "Embedding",
    "norm": "LayerNorm",
    "frozen": "frozen",
    "partly": "factored",
    "partly.bias": "frozen",
    "plain": "asked for",
    "head": "factored",
}


@pytest.mark.parametrize("steps", [0, 2])
def test_repr_and_table_have_every_module_with_parameters_and_no_other(steps):
    optimizer = run_through(everything_there_is(), steps)
    rows = {row.name: row.treatment for row in optimizer.report().rows}
    assert rows.keys() == EXPECTED.keys()
    for name, word in EXPECTED.items():
        assert word in rows[name]
        assert f"{name}: {rows[name]}" in repr(optimizer)
    lines = [line for line in str(optimizer.report()).splitlines() if line.strip()]
    for name, treatment in rows.items():
        (line,) = [line for line in lines if line.split()[0] == name]
        assert treatment in line


def test_repr_has_the_settings_of_method_and_groups():
    model = mlp()
    groups = [{"params": model[2].parameters(), "lr": 0.25, "damping": 0.75}]
    cost = Cost(factor_rows=2, eigenvalue_examples=5, input_rank=9, stagger=True)
    settings = {"fisher": "exact", "damping": ByTrace(0.5, floor=1e-6), "cost": cost}
    text = repr(TEKFAC(model, 0.5, momentum=0.375, param_groups=groups, **settings, **UNEVEN))
    for part in ("TEKFAC", "fisher='exact'", "interval=(2, 3, 1)", "decay=0.95", "warmup=0"):
        assert part in text
    for part in ("ByTrace(damping=0.5", "floor=1e-06"):
        assert part in text
    for part in ("factor_rows=2.0", "eigenvalue_examples=5", "input_rank=9", "stagger=True"):
        assert part in text
    lines = text.splitlines()
    assert "  group 0: 2 tensors, lr=0.25, momentum=0.375, weight_decay=0, damping=0.75" in lines
    assert "  group 1: 2 tensors, lr=0.5, momentum=0.375, weight_decay=0, damping=0.5" in lines


def test_parameters_that_are_added_later_appear_with_their_group():
    model = mlp()
    optimizer = TEKFAC(model, 1e-3)
    added = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in (7, 8, 8)]
    optimizer.add_param_group({"params": added, "lr": 0.125})
    lines = repr(optimizer).splitlines()
    assert "  group 1: 3 tensors, lr=0.125, momentum=0.9, weight_decay=0, damping=0.01" in lines
    names = [f"group 1, added parameter {i} ({size},)" for i, size in enumerate((7, 8, 8))]
    assert all(f"  {name}: plain SGD (not of the model)" in lines for name in names)
    assert [row.name for row in optimizer.report().rows] == ["0", "2", *names]


@every_method
def test_looking_changes_nothing(method):
    results = []
    for look in (False, True):
        model = mlp()
        optimizer = method(model, 1e-3, **UNEVEN)
        for x, y in batches((4,), 4):
            backward(model, optimizer, x, y)
            if look:
                str(optimizer.report()), repr(optimizer), optimizer.state_dict()
            optimizer.step()
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_the_table_shows_the_damping_of_the_rule_by_trace():
    """λ of a convolution is the mean of its spectrum; of a dense layer λ times the largest."""
    model = cnn()
    optimizer = EKFAC(model, 1e-3, damping=ByTrace(0.5), **EVERY_STEP)
    train(model, optimizer, batches((1, 6, 6), 1))
    rows = {row.name: row for row in optimizer.report().rows}
    D = {n: c["eigenvalues"]["D"] for n, c in optimizer.state_dict()["curvatures"].items()}
    for name in ("0", "3"):
        assert rows[name].damping == pytest.approx(D[name].mean().item(), rel=1e-12)
    assert rows["7"].damping == pytest.approx(
        0.5 * max(D["0"].mean().item(), D["3"].mean().item()), rel=1e-12
    )
