"""If this fails, what drawing saves is paid for with directions worse than statistics promises."""

from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tekfac_edu.optim import KFAC, TKFAC, Added, Cost

from .networks import CLASSES, double_precision
from .one_step import OBJECTIVES, corrected
from .oracles import per_example_gradients
from .training import every_method

N, DRAWS = 24, 20
DAMPING = 1e-2  # the default; between the mean and the largest eigenvalue of both convolutions


def network():
    """Convolutions with 64 and 16 positions, 10 and 37 inputs, and a dense layer."""
    return double_precision(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(4, 5, 3, padding=1),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(20, CLASSES),
        )
    )


def batch():
    """Pictures smoothed, and unlike in the two directions.

    White noise has no basis of its own: there any two samples give unlike ones.
    """
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(N, 1, 9, 10, generator=draw, dtype=torch.float64)
    x = 2 * functional.avg_pool2d(x, (2, 3), stride=1)
    return x, torch.randint(CLASSES, (N,), generator=draw)


@cache
def directions(method, step=0, damping=DAMPING, **drawn):
    """The preconditioned gradient of both convolutions, drawn as step `step` draws; curvatures."""
    model, (x, y) = network(), batch()
    optimizer = method(model, 0.0, process_group=None, damping=Added(damping), cost=Cost(**drawn))
    optimizer.steps = step  # 0 is no special step: nothing is ready, so all is due
    functional.cross_entropy(model(x), y).backward()
    modules = [model[0], model[3]]
    gradients = [torch.cat([m.weight.grad.flatten(1), m.bias.grad[:, None]], 1) for m in modules]
    optimizer.step()
    pairs = zip(modules, gradients, strict=True)
    return [optimizer.precondition(*pair) for pair in pairs], list(optimizer.curvatures.values())


def mean_distance(method, **drawn):
    """From the exact direction, relative, the mean over draws; one for each convolution."""
    exact, _ = directions(method)
    distances = [
        [
            ((ours - theirs).norm() / theirs.norm()).item()
            for ours, theirs in zip(directions(method, step, **drawn)[0], exact, strict=True)
        ]
        for step in range(DRAWS)
    ]
    return np.mean(distances, 0)


@every_method
def test_four_rows_per_input_and_half_the_examples_are_within_the_error_of_their_sample_sizes(
    method,
):
    """√(1/4 + 1/12), from the two sample sizes alone, for every layer.

    A covariance of d numbers from r·d rows has relative Frobenius error √((d + 1) / (r d)) ≈ 1/√r
    at the most (Gaussian rows of one variance; a faster spectrum, fewer effective numbers, makes it
    smaller, and so does drawing without replacement): 1/2 for r = 4. A measured eigenvalue, the
    mean of n of N squares of about Gaussian numbers, has relative error √(2/n · (1 − n/N)) =
    √(1/12) for n = 12 of 24. Independent errors add in squares. To first order a relative error of
    F̂ is one of (F̂ + λ)⁻¹ where F̂ ≫ λ, and less where not. (White noise, or λ far below the mean
    eigenvalue, would break the bound: no basis to estimate, or nothing to estimate it from.)
    """
    distance = mean_distance(method, factor_rows=4, eigenvalue_examples=N // 2)
    assert all(distance > 0)
    assert all(distance < np.sqrt(1 / 4 + 1 / 12))


@every_method
def test_the_error_shrinks_as_rows_grow_and_ends_at_nothing(method):
    """Of products of factors as 1/√rows at least: from 2 to 16 per input by 2.8; 2 is demanded.

    Of the other two methods it is the basis that is off, and it is only said to get better.
    """
    few, more, all_of_them = (mean_distance(method, factor_rows=r) for r in (2, 16, 1e9))
    assert all(more < few / (2 if method in (KFAC, TKFAC) else 1))
    assert all(all_of_them == 0)


@corrected
def test_the_error_shrinks_as_examples_grow_and_ends_at_nothing(method):
    """As √(1/n − 1/N): from 6 to 18 of 24 by the factor 3; 2 is demanded."""
    few, more, all_of_them = (mean_distance(method, eigenvalue_examples=n) for n in (6, 18, N))
    assert all(more < few / 2)
    assert all(all_of_them == 0)


@pytest.mark.parametrize("damping", [0.02, 0.5])
@corrected
def test_the_squared_error_of_drawn_examples_is_below_what_sampling_theory_proves(method, damping):
    """E‖error‖² ≤ Σ_ij (exact direction)²_ij Var(D̂_ij) / λ², in the exact basis.

    For (D̂ + λ)⁻¹ − (D + λ)⁻¹ = (D − D̂) / ((D̂ + λ)(D + λ)) and D̂ >= 0; the variance of a mean of n
    of N without replacement is σ²/n · (N − n)/(N − 1), σ² from the oracle's gradients one by one.
    The mean of 20 draws may exceed its expectation by half.
    """
    n = N // 2
    exact, curvatures = directions(method, damping=damping)
    model = network()
    for i, index in enumerate((0, 3)):
        G = per_example_gradients(model, model[index], OBJECTIVES["empirical"], batch())[0]
        Q_in, Q_out = (Q.numpy() for Q in curvatures[i].basis)
        squares = (Q_out.T @ G @ Q_in) ** 2
        variance = squares.var(0) / n * (N - n) / (N - 1)
        bound = ((Q_out.T @ exact[i].numpy() @ Q_in) ** 2 * variance).sum() / damping**2
        errors = [
            directions(method, step, damping=damping, eigenvalue_examples=n)[0][i] - exact[i]
            for step in range(DRAWS)
        ]
        found = np.mean([error.square().sum().item() for error in errors])
        assert 0 < found < 1.5 * bound
