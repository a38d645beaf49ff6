"""The whole optimizer by dense matrices, on a network of its own that it never meets.

    m ← τ m + direction,   p ← p − lr · weight_decay · p − lr · m     direction = λ (F̂ + λ)⁻¹ vec(∇)

Every step: numerators of the factors, then bases (the averaged matrix loses what is off its
diagonal there), then second moments in the new basis, then the update. No inverse is clever.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from tekfac_edu.optim import Added, ByTrace, Paper

from .oracles import (
    factors_of_independence,
    layer_rows,
    second_moments,
    summed_numerators,
    trace_restricted_numerators,
    trained,
    vec,
    weight_matrix,
)

INDEPENDENCE, CORRECTED = ("KFAC", "EKFAC"), ("EKFAC", "TEKFAC")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


@dataclass
class Settings:
    """What the optimizer is told; `interval` is that of factors, bases and eigenvalues.

    `rule` is "Paper", "Added" or "ByTrace"; `multiplier` and `floor` are for the last of them.
    """

    lr: float = 2.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    damping: float = 0.05
    rule: str = "Paper"
    multiplier: float = 1.0
    floor: float = 1e-8
    interval: tuple = (1, 1, 1)
    warmup: int = 0
    decay: float = 0.95
    positions: str = "apart"
    trust: float | None = None

    def arguments(self):
        """Keyword arguments of an optimizer, the damping as one of its rules."""
        rules = {
            "Paper": Paper(self.damping),
            "Added": Added(self.damping),
            "ByTrace": ByTrace(self.damping, multiplier=self.multiplier, floor=self.floor),
        }
        other = ("interval", "warmup", "decay", "positions", "trust")
        same = {name: getattr(self, name) for name in ("lr", "momentum", "weight_decay", *other)}
        return same | {"damping": rules[self.rule]}


class DenseLayer:
    """One layer's running averages, and the dense matrix that the method makes of them."""

    def __init__(self, method, settings):
        self.method, self.settings = method, settings
        self.numerators = self.held = self.bases = self.scaled = None

    def update(self, step, a, g):
        s = self.settings
        factors, bases, eigenvalues = s.interval
        if step < s.warmup:
            step = 0  # every interval divides it
        if step % factors == 0:
            rule = trace_restricted_numerators
            if self.method in INDEPENDENCE:
                rule = factors_of_independence
            elif s.positions == "summed":
                rule = summed_numerators
            self.numerators = averaged(self.numerators, rule(a, g), s.decay)
        if step % bases == 0:
            if self.method in INDEPENDENCE:
                self.held = (1.0, *self.numerators)
            else:
                delta, left, right = self.numerators
                self.held = (delta, left / delta, right / delta)
            self.bases = [np.linalg.eigh(S)[1] for S in self.held[1:]]
            if self.scaled is not None:
                self.scaled = diagonal_in(self.bases, self.scaled)
        if step % eigenvalues == 0:
            G = np.einsum("snto,nti->snoi", g, a)
            Q = np.kron(*self.bases)
            new = (Q * vec(second_moments(G, *self.bases))) @ Q.T
            old = None if self.scaled is None else (self.scaled,)
            (self.scaled,) = averaged(old, (new,), s.decay)

    def dense(self):
        scale, left, right = self.held
        return self.scaled if self.method in CORRECTED else scale * np.kron(left, right)

    def damped(self, damping):
        if self.method in CORRECTED or self.settings.rule == "Added":
            return self.dense() + damping * np.eye(len(self.dense()))
        scale, left, right = self.held
        root, share = np.sqrt(damping), 1.0
        if self.method == "KFAC":
            share = np.sqrt((np.trace(left) / len(left)) / (np.trace(right) / len(right)))
        left, right = np.sqrt(scale) * left, np.sqrt(scale) * right
        return np.kron(
            left + share * root * np.eye(len(left)), right + root / share * np.eye(len(right))
        )


def averaged(old, new, decay):
    if old is None:
        return new
    return tuple(decay * x + (1 - decay) * y for x, y in zip(old, new, strict=True))


def diagonal_in(bases, F):
    Q = np.kron(*bases)
    return (Q * np.diag(Q.T @ F @ Q)) @ Q.T


@dataclass
class DenseTraining:
    """Training of `model`; `rows(model, module, batch)` says where a layer's a and g come from."""

    model: nn.Module
    method: str
    settings: Settings
    loss_of: object
    rows: object
    steps: int = 0
    velocities: dict = field(default_factory=dict)

    def __post_init__(self):
        self.layers = {
            module: DenseLayer(self.method, self.settings)
            for module in self.model.modules()
            if isinstance(module, (nn.Linear, *CONVOLUTIONS))
        }

    def step(self, batch):
        rows = {module: self.rows(self.model, module, batch) for module in self.layers}
        parameters = list(self.model.parameters())
        loss = self.loss_of(self.model, *batch)
        gradients = dict(zip(parameters, torch.autograd.grad(loss, parameters), strict=True))
        for module, layer in self.layers.items():
            layer.update(self.steps, *rows[module])
        damping = self.dampings()
        directions = {
            module: self.direction(module, layer, damping[module], gradients)
            for module, layer in self.layers.items()
        }
        shrunk = self.shrinkage(directions, damping)
        for module, (_, direction) in directions.items():
            self.step_layer(module, shrunk * direction)
        for parameter in set(parameters).difference(*map(trained, self.layers)):
            self.move(parameter, gradients[parameter])
        self.steps += 1

    def dampings(self):
        s = self.settings
        if s.rule != "ByTrace":
            return dict.fromkeys(self.layers, s.damping)
        own = {
            module: s.multiplier * max(np.trace(F), s.floor) / len(F)
            for module, F in ((module, layer.dense()) for module, layer in self.layers.items())
            if isinstance(module, CONVOLUTIONS)
        }
        pace = max(own.values(), default=1.0)
        return {module: own.get(module, pace * s.damping) for module in self.layers}

    def direction(self, module, layer, damping, gradients):
        """The gradient, and the damped inverse times it, times the damping."""
        M = weight_matrix(*[gradients[parameter] for parameter in trained(module)])
        solved = np.linalg.solve(layer.damped(damping), vec(M))
        return M, damping * solved.reshape(M.shape, order="F")

    def shrinkage(self, directions, damping):
        """What makes stepᵀ (F̂ + λ) step, summed over layers, at most κ; by the dense matrices."""
        if self.settings.trust is None:
            return 1.0
        predicted = 0.0
        for module, (_, direction) in directions.items():
            step = self.settings.lr * vec(direction)
            predicted += step @ self.layers[module].damped(damping[module]) @ step
        return min(1.0, (self.settings.trust / predicted) ** 0.5)

    def step_layer(self, module, direction):
        kernel = module.weight[0].numel()
        parts = [
            direction[:, :kernel].reshape(module.weight.shape),
            direction[:, kernel:].flatten(),
        ]
        for parameter, part in zip(trained(module), parts, strict=False):
            self.move(parameter, torch.tensor(part))

    def move(self, parameter, direction):
        lr = self.settings.lr
        velocity = self.settings.momentum * self.velocities.get(parameter, 0) + direction
        self.velocities[parameter] = velocity
        with torch.no_grad():
            parameter -= lr * self.settings.weight_decay * parameter + lr * velocity


def looped_rows(objectives):
    return lambda model, module, batch: layer_rows(model, module, objectives, batch)
