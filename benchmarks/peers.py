"""Second-order optimizers of other packages, made for `speed.py`; peers.txt lists the packages.

    PEERS[name](model, interval)

is an optimizer, or a step of its own: called with a batch, with a `model` and an `optimizer`. Each
imports its package itself. Learning rates are small: what is measured is time. The first paragraph
of a function's docstring goes into the record as its settings.

ASDL's EKFAC is not among them: version 0.1a5 never calls the `_precondition` it overrides, and
hands the gradient back as it was.
"""

import contextlib
import warnings
from importlib import metadata
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.functional import cross_entropy

LR = 1e-3
PEERS, PACKAGES = {}, {}


def peer(name, package):
    """Enter a function under this name; package: what PyPI calls it."""

    def enter(function):
        PEERS[name], PACKAGES[name] = function, package
        return function

    return enter


def described(name):
    """Package, version and settings of a peer, for the record."""
    settings = PEERS[name].__doc__.split("\n\n")[0]
    version = metadata.version(PACKAGES[name])
    return {"package": f"{PACKAGES[name]} {version}", "settings": " ".join(settings.split())}


def trainable(model):
    """The parameters that an optimizer is given."""
    return [p for p in model.parameters() if p.requires_grad]


@peer("SOAP (heavyball)", "heavyball")
def heavyball_soap(model, interval):
    """precondition_frequency=interval; statistics at every step; eager mode.

    Its compiled mode tunes for tens of seconds on a CPU and is no faster afterwards.
    """
    import heavyball
    from heavyball import utils

    utils.compile_mode = None
    return heavyball.SOAP(trainable(model), lr=LR, precondition_frequency=interval)


@peer("SOAP (pytorch-optimizer)", "pytorch-optimizer")
def pytorch_optimizer_soap(model, interval):
    """precondition_frequency=interval; statistics at every step; dimensions not merged."""
    from pytorch_optimizer import SOAP

    return SOAP(trainable(model), lr=LR, precondition_frequency=interval)


@peer("KL-Shampoo (heavyball)", "heavyball")
def heavyball_kl_shampoo(model, interval):
    """precondition_frequency=interval; statistics at every step; eager mode."""
    import heavyball
    from heavyball import utils

    utils.compile_mode = None
    return heavyball.KLShampoo(trainable(model), lr=LR, precondition_frequency=interval)


@peer("Shampoo (pytorch-optimizer)", "pytorch-optimizer")
def pytorch_optimizer_shampoo(model, interval):
    """ScalableShampoo, from the first step on; statistics_compute_steps and
    preconditioning_compute_steps=interval.
    """
    from pytorch_optimizer import ScalableShampoo

    return ScalableShampoo(
        trainable(model),
        lr=LR,
        start_preconditioning_step=1,
        statistics_compute_steps=interval,
        preconditioning_compute_steps=interval,
    )


@peer("SINGD, dense", "singd")
def singd_dense(model, interval):
    """T=interval, dense structures; batch norm, which it has no factors for, by SGD."""
    return singd(model, interval, "dense")


@peer("SINGD, diagonal", "singd")
def singd_diagonal(model, interval):
    """T=interval, diagonal structures; batch norm, which it has no factors for, by SGD."""
    return singd(model, interval, "diagonal")


@peer("KFAC (asdfghjkl)", "asdfghjkl")
def asdl_kfac(model, interval):
    """KfacGradientMaker, empirical Fisher, both intervals=interval, damping 0.01, ema_decay 0.05;
    batch norm by SGD.
    """
    from asdl import FISHER_EMP, KfacGradientMaker

    return AsdlStep(model, interval, KfacGradientMaker, fisher_type=FISHER_EMP)


@peer("Shampoo (asdfghjkl)", "asdfghjkl")
def asdl_shampoo(model, interval):
    """ShampooGradientMaker, both intervals=interval, damping 0.01, ema_decay 0.05."""
    from asdl import ShampooGradientMaker

    return AsdlStep(model, interval, ShampooGradientMaker)


def singd(model, interval, structure):
    from singd.optim.optimizer import SINGD

    factored = [
        p
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        for p in module.parameters(recurse=False)
    ]
    known = set(map(id, factored))
    others = [p for p in trainable(model) if id(p) not in known]
    optimizer = SINGD(
        model,
        factored,
        lr=LR,
        T=interval,
        structures=(structure, structure),
        warn_unsupported=False,
    )
    return Together(optimizer, torch.optim.SGD(others, LR, 0.9)) if others else optimizer


class Together:
    """Several optimizers that step at once, each with its own parameters."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self):
        return [optimizer.state_dict() for optimizer in self.optimizers]


class AsdlStep:
    """A step of ASDL, whose gradient makers call the network themselves, and SGD with momentum.

    Its NVTX ranges, which a torch without CUDA refuses, become empty ones there.
    """

    def __init__(self, model, interval, maker, **settings):
        from asdl import PreconditioningConfig, operations, precondition

        if not torch.cuda.is_available():
            silent = SimpleNamespace(range=lambda *_, **__: contextlib.nullcontext())
            for module in (
                operations.operation,
                precondition.natural_gradient,
                precondition.shampoo,
            ):
                module.nvtx = silent
        warnings.filterwarnings("ignore", "Using a non-full backward hook", FutureWarning)
        norms = [nn.BatchNorm1d, nn.BatchNorm2d]
        configuration = PreconditioningConfig(
            preconditioner_upd_interval=interval,
            curvature_upd_interval=interval,
            damping=1e-2,
            ema_decay=0.05,
            ignore_modules=norms,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of every ReLU, that it is not supported
            self.maker = maker(model, configuration, **settings)
        self.model = model
        self.sgd = torch.optim.SGD(trainable(model), LR, 0.9)
        self.optimizer = SimpleNamespace(state_dict=self.state_dict)

    def __call__(self, x, y):
        self.sgd.zero_grad()
        self.maker.config.data_size = len(x)
        outputs = self.maker.setup_model_call(self.model, x)
        self.maker.setup_loss_call(cross_entropy, outputs, y)
        self.maker.forward_and_backward()
        self.sgd.step()

    def state_dict(self):
        """Momentum, and what lies in the layers and the maker, which its own state omits."""
        layers = [getattr(module, "fisher", None) for module in self.model.modules()]
        return [self.sgd.state_dict(), layers, getattr(self.maker, "preconditioners", None)]
