"""From a configuration to the objects of a run: images, model, optimizer, schedule."""

import math
from functools import lru_cache

import torch

from tekfac_edu import models
from tekfac_edu.data.images import load_images
from tekfac_edu.experiments.configuration import KRONECKER
from tekfac_edu.optim import EKFAC, KFAC, TEKFAC, TKFAC

METHODS = dict(zip(KRONECKER, (KFAC, EKFAC, TKFAC, TEKFAC), strict=True))
HIDDEN = {"mlp": (256, 128), "autoencoder": (1000, 500, 250, 30)}

_load = lru_cache(maxsize=1)(load_images)  # a race loads its images once


def build_images(configuration, folder, device):
    """The images of a run: tuned on a held-out part, or a subset, if so configured."""
    images = _load(configuration.dataset, folder, device)
    if configuration.train_images is not None or configuration.test_images is not None:
        images = images.first(configuration.train_images, configuration.test_images)
    return images.hold_out() if configuration.held_out else images


def build_model(configuration, images):
    """The network, initialized from the run's seed."""
    torch.manual_seed(configuration.seed)
    channels, *sides = images.x_train.shape[1:]
    classes, pixels = len(images.classes), channels * math.prod(sides)
    if configuration.model in HIDDEN:
        hidden = configuration.widths
        hidden = HIDDEN[configuration.model] if hidden is None else hidden
        if configuration.model == "mlp":
            return models.mlp((pixels, *hidden, classes))
        return models.autoencoder((pixels, *hidden))
    width = {} if configuration.width is None else {"width": configuration.width}
    build = models.resnet20 if configuration.model == "resnet20" else models.vgg16
    return build(classes, channels, **width)


def build_optimizer(configuration, model):
    """One of the six. Weight decay is decoupled in all of them."""
    c = configuration
    if c.optimizer == "sgd":
        return DecoupledSGD(model.parameters(), c.lr, c.momentum, c.weight_decay)
    if c.optimizer == "adam":
        return torch.optim.AdamW(
            model.parameters(), c.lr, (c.momentum, 0.999), weight_decay=c.weight_decay
        )
    return METHODS[c.optimizer](
        model,
        c.lr,
        momentum=c.momentum,
        weight_decay=c.weight_decay,
        damping=c.damping,
        damping_rule=c.damping_rule,
        damping_policy=c.damping_policy,
        fisher=c.fisher,
        factor_interval=c.interval,
        eigen_interval=c.interval,
        scale_interval=c.interval,
        warmup_steps=c.warmup_steps,
        factor_decay=c.factor_decay,
        scale_decay=c.scale_decay,
        eigenbasis=c.eigenbasis,
        input_rank=c.input_rank,
        factor_rows=c.factor_rows,
        scale_examples=c.scale_examples,
        stagger=c.stagger,
        precision=c.precision,
        lr_scale="sgd",
    )


class DecoupledSGD(torch.optim.SGD):
    """torch's SGD with momentum, with the weight decay of AdamW: θ ← θ − lr · weight_decay · θ."""

    def __init__(self, parameters, lr, momentum, weight_decay):
        super().__init__(parameters, lr, momentum)
        self.decay = weight_decay

    @torch.no_grad()
    def step(self, closure=None):
        if self.decay:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.mul_(1 - group["lr"] * self.decay)
        return super().step(closure)


def learning_rate_factor(schedule, epochs, epoch):
    """What the learning rate is multiplied with; epoch counts with fractions, from 0 to epochs."""
    if schedule == "cosine":
        return (1 + math.cos(math.pi * epoch / epochs)) / 2
    if schedule == "step":
        return 0.1 ** ((epoch >= epochs / 2) + (epoch >= 3 * epochs / 4))
    return 1.0
