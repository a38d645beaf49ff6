"""Natural-gradient descent on an MLP: the loop around the four methods.

    m ← τ m + direction,   W ← W − α m          direction = (F̂ + damping)⁻¹ ∇

In one step: statistics, then eigenbases, then eigenvalues in the new basis, then the update
(TEKFAC Algorithm 1). Statistics are running averages; bases and eigenvalues may be refreshed less
often than every step. Beside chapter 5; written to be read, one layer after another.
"""

import numpy as np

from tekfac_edu.arguments import one_of, real_number, whole_number
from tekfac_edu.reference.damping import nonnegative_damping
from tekfac_edu.reference.eigenbasis import eigenbasis, qr_iteration
from tekfac_edu.reference.ekfac import EKFAC
from tekfac_edu.reference.inputs import random_generator
from tekfac_edu.reference.kfac import KFAC
from tekfac_edu.reference.rescaling import corrected_eigenvalues, move_eigenvalues
from tekfac_edu.reference.tekfac import TEKFAC
from tekfac_edu.reference.tkfac import TKFAC

METHODS = {"kfac": KFAC, "ekfac": EKFAC, "tkfac": TKFAC, "tekfac": TEKFAC}


class LayerCurvature:
    """What one layer remembers between steps: averaged factors, and the method built from them.

    Parameters
    ----------
    method : KFAC, EKFAC, TKFAC or TEKFAC.
    factor_decay, scale_decay : weight of the old value in the running averages, 0 to 1.
    basis : "eigh", or "qr" for one warm-started QR iteration per refresh (corrected methods only).

    Attributes
    ----------
    approximation : the method's object, once it has been refreshed.
    """

    def __init__(self, method, factor_decay=0.95, scale_decay=0.95, basis="eigh"):
        self.method = method
        self.factor_decay = real_number("factor_decay", factor_decay, at_least=0, at_most=1)
        self.scale_decay = real_number("scale_decay", scale_decay, at_least=0, at_most=1)
        self.basis = one_of("basis", basis, ("eigh", "qr"))
        if basis == "qr" and not method.corrected:
            raise ValueError(
                f'basis="qr" is for EKFAC and TEKFAC, which are exact about any basis; '
                f'{method.__name__} needs the eigenvalues of its factors: "eigh"'
            )
        self.factors = self.Q_in = self.Q_out = self.eigenvalues = self.approximation = None

    def update_factors(self, a, g):
        """Average in the factors of a batch; the first batch replaces."""
        new = self.method.estimate_factors(a, g)
        if self.factors is not None:
            new = self.factors.averaged_with(new, self.factor_decay)
        self.factors = new

    def update_basis(self):
        """Decompose the averaged factors; a corrected method's eigenvalues move along."""
        if not self.method.corrected:
            self.approximation = self.method.from_factors(self.factors)
            return
        old = self.Q_in, self.Q_out
        S_in, S_out = self.factors.pair
        if self.basis == "qr" and self.Q_in is not None:
            self.Q_in, self.Q_out = qr_iteration(S_in, old[0]), qr_iteration(S_out, old[1])
        else:
            self.Q_in, self.Q_out = eigenbasis(S_in)[1], eigenbasis(S_out)[1]
        if self.eigenvalues is not None:
            self.eigenvalues = move_eigenvalues(self.eigenvalues, *old, self.Q_in, self.Q_out)
            self.approximation = self.method(self.Q_in, self.Q_out, self.eigenvalues)

    def update_scale(self, a, g):
        """Average in the corrected eigenvalues of a batch, measured in the present basis."""
        if not self.method.corrected:
            return
        new = corrected_eigenvalues(a, g, self.Q_in, self.Q_out)
        if self.eigenvalues is not None:
            new = self.scale_decay * self.eigenvalues + (1 - self.scale_decay) * new
        self.eigenvalues = new
        self.approximation = self.method(self.Q_in, self.Q_out, new)


class NaturalGradient:
    """Natural-gradient descent with one of the four methods.

    Parameters
    ----------
    mlp : MLP, trained in place.
    method : "kfac", "ekfac", "tkfac" or "tekfac"; or a class of your own built like theirs.
    lr : α > 0. With lr_scale="natural" unitless: 1 is a full Newton-like step.
    damping : λ >= 0, in units of the Fisher; 0 only while no layer's curvature is singular.
    momentum : τ, 0 to below 1.
    loss, fisher : as for `MLP.layer_statistics`.
    factor_interval, eigen_interval, scale_interval : steps between refreshes of the factors, the
        eigenbases and the corrected eigenvalues (T_FIM, T_EIG, T_RE of TEKFAC's Algorithm 1).
    factor_decay, scale_decay : weight of the old value in the running averages.
    basis : "eigh" or "qr".
    lr_scale : "natural", or "sgd": the direction is multiplied by the damping, so that lr means in
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
        factor_interval=1,
        eigen_interval=1,
        scale_interval=1,
        factor_decay=0.95,
        scale_decay=0.95,
        basis="eigh",
        lr_scale="natural",
        rng=None,
    ):
        self.mlp = mlp
        if not isinstance(method, type):
            method = METHODS[one_of("method", method, METHODS)]
        self.lr = real_number("lr", lr, above=0)
        self.damping = nonnegative_damping(damping)
        self.momentum = real_number("momentum", momentum, at_least=0, below=1)
        self.loss, self.fisher, self.rng = loss, fisher, rng
        self.factor_interval = whole_number("factor_interval", factor_interval, 1)
        self.eigen_interval = whole_number("eigen_interval", eigen_interval, 1)
        self.scale_interval = whole_number("scale_interval", scale_interval, 1)
        self.lr_scale = one_of("lr_scale", lr_scale, ("natural", "sgd"))
        self.curvatures = [
            LayerCurvature(method, factor_decay, scale_decay, basis) for _ in mlp.weights
        ]
        self.velocities = [np.zeros_like(W) for W in mlp.weights]
        self.steps = 0

    def step(self, x, y):
        """One update from a batch; returns the mean loss before it.

        x : (N, d) array.   y : targets as for `MLP.loss`. On an error no weight has moved.
        """
        statistics = self.mlp.layer_statistics(x, y, self.fisher, self.loss, self.rng)
        gradients = self.mlp.gradients(x, y, self.loss)
        loss = self.mlp.loss(x, y, self.loss)
        directions = []
        for curvature, layer, M in zip(self.curvatures, statistics, gradients, strict=True):
            self._refresh(curvature, layer.a, layer.g)
            directions.append(curvature.approximation.precondition(M, self.damping))
        for layer, direction in enumerate(directions):
            if self.lr_scale == "sgd":
                direction = self.damping * direction
            self.velocities[layer] = self.momentum * self.velocities[layer] + direction
            self.mlp.weights[layer] = self.mlp.weights[layer] - self.lr * self.velocities[layer]
        self.steps += 1
        return loss

    def _refresh(self, curvature, a, g):
        if self.steps % self.factor_interval == 0:
            curvature.update_factors(a, g)
        if self.steps % self.eigen_interval == 0:
            curvature.update_basis()
        if self.steps % self.scale_interval == 0:
            curvature.update_scale(a, g)


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
