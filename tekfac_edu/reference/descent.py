"""Natural-gradient descent on a small network: the loop around the four methods.

    m ← τ m + direction,   W ← W − α m          direction = (F̂ + damping)⁻¹ ∇

In one step: statistics, then eigenbases, then eigenvalues in the new basis, then the update
(TEKFAC Algorithm 1). Statistics are running averages; bases and eigenvalues may be refreshed less
often than every step. Beside chapter 5; written to be read, one layer after another.
"""

import numpy as np

from tekfac_edu.arguments import one_of, real_number, whole_number
from tekfac_edu.reference.curvature import LayerCurvature
from tekfac_edu.reference.damping import Paper
from tekfac_edu.reference.eigenbasis import precondition
from tekfac_edu.reference.ekfac import EKFAC
from tekfac_edu.reference.inputs import random_generator
from tekfac_edu.reference.kfac import KFAC
from tekfac_edu.reference.tekfac import TEKFAC
from tekfac_edu.reference.tkfac import TKFAC

METHODS = {"kfac": KFAC, "ekfac": EKFAC, "tkfac": TKFAC, "tekfac": TEKFAC}


class NaturalGradient:
    """Natural-gradient descent with one of the four methods.

    Parameters
    ----------
    mlp : MLP or ConvNet, trained in place.
    method : "kfac", "ekfac", "tkfac" or "tekfac"; or a class of your own built like theirs. What
        divides a gradient is its `damped` (or what the rule makes of it), not its `precondition`.
    lr : α > 0. With lr_scale="natural" unitless: 1 is a full Newton-like step.
    damping : λ >= 0, in units of the Fisher, 0 only while no layer's curvature is singular: each
        method's own way of adding it; or a rule, Paper(λ), Added(λ) or ByTrace(λ).
    momentum : τ, 0 to below 1.
    loss, fisher : as for `MLP.layer_statistics`.
    interval : steps between refreshes, a whole number; or three of them: of the factors, of the
        bases and of the measured eigenvalues (T_FIM, T_EIG, T_RE of TEKFAC's Algorithm 1).
    decay : ρ, weight of the old value in the running averages of factors and eigenvalues, 0 to 1.
    basis, positions : as for LayerCurvature.
    lr_scale : "natural", or "sgd": a layer's direction is multiplied by its λ, so that lr means in
        flat directions what it means for SGD.
    rng : numpy Generator, needed by fisher="mc".
    """

    def __init__(
        self,
        mlp,
        method,
        lr,
        damping,
        *,
        momentum=0.9,
        loss="cross_entropy",
        fisher="mc",
        interval=1,
        decay=0.95,
        basis="eigh",
        positions="apart",
        lr_scale="natural",
        rng=None,
    ):
        self.mlp = mlp
        if not isinstance(method, type):
            method = METHODS[one_of("method", method, METHODS)]
        self.lr = real_number("lr", lr, above=0)
        self.rule = damping if hasattr(damping, "layer_dampings") else Paper(damping)
        self.momentum = real_number("momentum", momentum, at_least=0, below=1)
        self.loss, self.fisher, self.rng = loss, fisher, rng
        self.interval = three_intervals(interval)
        self.lr_scale = one_of("lr_scale", lr_scale, ("natural", "sgd"))
        self.curvatures = [LayerCurvature(method, decay, basis, positions) for _ in mlp.weights]
        self.velocities = [np.zeros_like(W) for W in mlp.weights]
        self.steps = 0

    def step(self, x, y):
        """One update from a batch; returns the mean loss before it.

        x, y : inputs and targets as for `MLP.loss`. On an error no weight has moved.
        """
        statistics = self.mlp.layer_statistics(x, y, self.fisher, self.loss, self.rng)
        gradients = self.mlp.gradients(x, y, self.loss)
        loss = self.mlp.loss(x, y, self.loss)
        for curvature, layer in zip(self.curvatures, statistics, strict=True):
            self._refresh(curvature, layer.a, layer.g)
        for layer, direction in enumerate(self._directions(gradients)):
            self.velocities[layer] = self.momentum * self.velocities[layer] + direction
            self.mlp.weights[layer] = self.mlp.weights[layer] - self.lr * self.velocities[layer]
        self.steps += 1
        return loss

    def _refresh(self, curvature, a, g):
        factors, bases, eigenvalues = (self.steps % interval == 0 for interval in self.interval)
        if factors:
            curvature.average_factors(a, g)
        if bases:
            curvature.turn_to(curvature.factors)
        if eigenvalues:
            curvature.average_eigenvalues(a, g)

    def _directions(self, gradients):
        """Of every layer, a list of (d_out, d_in) arrays."""
        directions = []
        dampings = self.rule.layer_dampings(self.curvatures)
        for curvature, damping, M in zip(self.curvatures, dampings, gradients, strict=True):
            F = curvature.approximation
            direction = precondition(M, F.Q_in, F.Q_out, self.rule.damped(F, damping))
            directions.append(damping * direction if self.lr_scale == "sgd" else direction)
        return directions


def three_intervals(interval):
    """(factors, bases, eigenvalues), from one whole number >= 1 or from three."""
    three = interval if isinstance(interval, tuple | list) else (interval,) * 3
    if len(three) != 3:
        raise ValueError(
            f"interval must be a whole number, or three: of the factors, the bases and the "
            f"eigenvalues; got {interval!r}"
        )
    return tuple(whole_number("interval", steps, 1) for steps in three)


class GradientDescent:
    """SGD with momentum, in the same clothes: the baseline of the chapters.

    Parameters
    ----------
    mlp : MLP, trained in place.   lr : α > 0.   momentum : τ, 0 to below 1.
    loss : as for `MLP.loss`.
    """

    def __init__(self, mlp, lr, *, momentum=0.9, loss="cross_entropy"):
        self.mlp, self.loss = mlp, loss
        self.lr = real_number("lr", lr, above=0)
        self.momentum = real_number("momentum", momentum, at_least=0, below=1)
        self.velocities = [np.zeros_like(W) for W in mlp.weights]

    def step(self, x, y):
        """One update from a batch; returns the mean loss before it."""
        loss = self.mlp.loss(x, y, self.loss)
        for layer, gradient in enumerate(self.mlp.gradients(x, y, self.loss)):
            self.velocities[layer] = self.momentum * self.velocities[layer] + gradient
            self.mlp.weights[layer] = self.mlp.weights[layer] - self.lr * self.velocities[layer]
        return loss


def train(optimizer, x, y, *, epochs, batch_size, rng):
    """Run an optimizer over shuffled mini-batches; the last, shorter batch of an epoch is kept.

    Parameters
    ----------
    optimizer : NaturalGradient or GradientDescent.
    x : (N, d) array.   y : targets as for `MLP.loss`.
    epochs, batch_size : whole numbers >= 1.   rng : numpy Generator that shuffles.

    Returns
    -------
    (epochs,) array: the mean over all of (x, y) of the loss after each epoch.
    """
    epochs = whole_number("epochs", epochs, 1)
    batch_size = whole_number("batch_size", batch_size, 1)
    rng = random_generator("rng", rng)
    x, y = np.asarray(x), np.asarray(y)
    history = []
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for start in range(0, len(x), batch_size):
            batch = order[start : start + batch_size]
            optimizer.step(x[batch], y[batch])
        history.append(optimizer.mlp.loss(x, y, optimizer.loss))
    return np.array(history)
