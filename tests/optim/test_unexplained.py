"""If this fails, a layer is preconditioned by statistics of something else, and nobody is told."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from tekfac_edu.optim import TEKFAC

from .networks import CLASSES, NETWORKS, batches, double_precision, mlp
from .training import EVERY_STEP, every_method, parameters, train


class Masked(nn.Linear):
    """Computes with another weight than its own, as pruning and adapters do."""

    def forward(self, x):
        mask = torch.arange(self.weight.numel()).reshape(self.weight.shape) % 2
        return functional.linear(x, self.weight * mask, self.bias)


@every_method
def test_a_gradient_that_the_captured_statistics_do_not_explain_is_named(method):
    model = double_precision(
        lambda: nn.Sequential(Masked(4, 5, bias=False), nn.Tanh(), nn.Linear(5, CLASSES))
    )
    optimizer = method(model, 10.0, **EVERY_STEP)
    with pytest.warns(RuntimeWarning, match=r"0 \(Masked\).*not the mean"):
        train(model, optimizer, batches((4,), 1))


@every_method
@pytest.mark.parametrize("network", NETWORKS)
def test_an_ordinary_model_is_explained(method, network):
    make, shape = NETWORKS[network]
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, method(model, 10.0, **EVERY_STEP), batches(shape, 2))


def test_an_input_that_is_overwritten_before_the_step_is_noticed():
    """A loader's buffer, filled anew between backward and step: parts of a batch in one place."""
    model, undisturbed = mlp(), mlp()
    optimizer, other = (TEKFAC(m, 1.0, damping=0.1, **EVERY_STEP) for m in (model, undisturbed))
    stream = list(batches((4,), 3))
    train(model, optimizer, stream[:1])
    train(undisturbed, other, stream[:1])
    buffer = torch.empty_like(stream[0][0])
    optimizer.zero_grad()
    other.zero_grad()
    try:
        for x, y in stream[1:]:
            (functional.cross_entropy(model(buffer.copy_(x)), y) / 2).backward()
            (functional.cross_entropy(undisturbed(x), y) / 2).backward()
        optimizer.step()
    except RuntimeError as error:
        assert "0 (Linear)" in str(error) and "in place" in str(error)
    else:
        other.step()
        assert torch.equal(parameters(model), parameters(undisturbed))


def test_an_attack_before_the_training_pass_is_no_part_of_the_batch():
    """autograd.grad for an adversarial example, then zero_grad, as such loops have it."""
    model, undisturbed = mlp(), mlp()
    optimizer, other = (TEKFAC(m, 1.0, damping=0.1, **EVERY_STEP) for m in (model, undisturbed))
    for x, y in batches((4,), 3):
        attacked = x.clone().requires_grad_()
        torch.autograd.grad(functional.cross_entropy(model(attacked), y), attacked)
        train(model, optimizer, [(x, y)])
        train(undisturbed, other, [(x, y)])
    assert torch.equal(parameters(model), parameters(undisturbed))


def test_a_gradient_penalty_takes_its_statistics_from_the_whole_loss_once():
    """create_graph=True goes through the layers a first time; with weight 0 nothing may change."""
    model, undisturbed = mlp(), mlp()
    optimizer, other = (TEKFAC(m, 1.0, damping=0.1, **EVERY_STEP) for m in (model, undisturbed))
    for x, y in batches((4,), 3):
        optimizer.zero_grad()
        leaf = x.clone().requires_grad_()
        loss = functional.cross_entropy(model(leaf), y)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (loss + 0 * gradient.square().sum()).backward()
        optimizer.step()
        train(undisturbed, other, [(x, y)])
    assert torch.allclose(parameters(model), parameters(undisturbed), rtol=1e-10, atol=1e-14)


def test_positions_folded_into_the_examples_are_said_to_be():
    """The first layer sees 3 · 12 rows, the second 12: a curvature of the wrong scale."""

    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.each, self.all = nn.Linear(4, 2), nn.Linear(6, 3)

        def forward(self, x):
            return self.all(torch.tanh(self.each(x.flatten(0, 1))).reshape(len(x), 6))

    model = Folded()
    optimizer = TEKFAC(model, 10.0)
    x, y = torch.randn(12, 3, 4), torch.arange(12) % 3
    with pytest.warns(RuntimeWarning, match="all.* saw 12 examples and each.* saw 36"):
        train(model, optimizer, [(x, y)])
