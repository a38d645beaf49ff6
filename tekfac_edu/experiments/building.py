"""From a configuration to the objects of a run: images, model, optimizer, schedule."""

from functools import lru_cache

import torch

from tekfac_edu.data.images import load_images
from tekfac_edu.experiments.methods import KRONECKER, METHODS
from tekfac_edu.experiments.networks import NETWORKS
from tekfac_edu.optim import Added, ByTrace, Paper

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
    network = NETWORKS[configuration.model]
    size = getattr(configuration, network.sized_by)
    size = network.size if size is None else size
    return network.build(images.x_train.shape[1:], len(images.classes), size)


RULES = {"paper": Paper, "added": Added, "by-trace": ByTrace}


def build_optimizer(configuration, model):
    """One of METHODS. Weight decay is decoupled in all of them."""
    c = configuration
    make = METHODS[c.optimizer].make
    if c.optimizer not in KRONECKER:
        return make(model.parameters(), c.lr, c.momentum, c.weight_decay)
    return make(
        model,
        c.lr,
        momentum=c.momentum,
        weight_decay=c.weight_decay,
        damping=RULES[c.damping_rule](c.damping),
        fisher=c.fisher,
        interval=c.interval,
        decay=c.decay,
        warmup=c.warmup,
        trust=c.trust,
        positions=c.positions if getattr(make, "summed_factors", None) else "apart",
        cost=c.cost,
    )


def build_schedule(configuration, optimizer, batches):
    """torch's scheduler of the learning rate, to be stepped after each of `batches` an epoch."""
    steps = configuration.epochs * batches
    schedules = torch.optim.lr_scheduler
    if configuration.schedule == "cosine":
        return schedules.CosineAnnealingLR(optimizer, steps)
    if configuration.schedule == "step":
        half, three_quarters = -(-steps // 2), -(-3 * steps // 4)  # of an epoch: the next batch
        return schedules.MultiStepLR(optimizer, [half, three_quarters], 0.1)
    return schedules.ConstantLR(optimizer, 1.0)
