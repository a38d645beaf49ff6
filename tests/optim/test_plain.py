"""If this fails, parameters that no factorization covers are not trained as torch.optim.SGD would.

The twin of every model has the same gradients handed to it and is stepped by torch's own SGD.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, StepLR

from tekfac_edu.optim import TEKFAC

from .networks import CLASSES, double_precision
from .training import EVERY_STEP, every_method

LR, MOMENTUM = 0.07, 0.8


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class OwnParameter(nn.Module):
    """A parameter that belongs to no layer, as a class token or a temperature does."""

    def __init__(self):
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(4)), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.scale * x)


def before_a_head(layer, outputs=5):
    return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(outputs, CLASSES))


def numbers(*shape):
    draw = torch.Generator().manual_seed(7)
    return lambda: torch.randn(6, *shape, generator=draw, dtype=torch.float64)


def words():
    draw = torch.Generator().manual_seed(7)
    return lambda: torch.randint(9, (6, 2), generator=draw)


# what is plain by itself: model, batches, names in repr, a word of the reason
COVERED_BY_NOTHING = {
    "BatchNorm": (lambda: before_a_head(nn.BatchNorm1d(5)), numbers(5), ["0"], "BatchNorm1d"),
    "LayerNorm": (lambda: before_a_head(nn.LayerNorm(5)), numbers(5), ["0"], "LayerNorm"),
    "PReLU": (lambda: before_a_head(nn.PReLU()), numbers(5), ["0"], "PReLU"),
    "Embedding": (lambda: before_a_head(nn.Embedding(9, 3), 6), words(), ["0"], "Embedding"),
    "MultiheadAttention": (
        Attention,
        numbers(3, 4),
        ["attention", "attention.out_proj"],
        "MultiheadAttention",
    ),
    "weight_norm": (
        lambda: before_a_head(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))),
        numbers(4),
        ["0", "0.parametrizations.weight"],
        "computed|ParametrizationList",
    ),
    "the old weight_norm": (
        lambda: before_a_head(nn.utils.weight_norm(nn.Linear(4, 5))),
        numbers(4),
        ["0"],
        "computed",
    ),
    "spectral_norm": (
        lambda: before_a_head(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5))),
        numbers(4),
        ["0", "0.parametrizations.weight"],
        "computed|ParametrizationList",
    ),
    "LSTM": (
        lambda: nn.ModuleDict({"lstm": nn.LSTM(4, 5, batch_first=True), "head": nn.Linear(5, 3)}),
        numbers(3, 4),
        ["lstm"],
        "LSTM",
    ),
    "a parameter of its own": (OwnParameter, numbers(4), ["the model"], "OwnParameter"),
}

# what is plain because it was asked for
ASKED_FOR = {
    "Linear": (lambda: before_a_head(nn.Linear(4, 5)), numbers(4), ["0"]),
    "Conv2d": (lambda: before_a_head(nn.Conv2d(1, 2, 2), 8), numbers(1, 3, 3), ["0"]),
    "grouped": (lambda: before_a_head(nn.Conv1d(2, 2, 1, groups=2), 6), numbers(2, 3), ["0"]),
    "Conv3d": (lambda: before_a_head(nn.Conv3d(1, 1, 2), 8), numbers(1, 3, 3, 3), ["0"]),
    "transposed": (lambda: before_a_head(nn.ConvTranspose1d(1, 1, 2), 4), numbers(1, 3), ["0"]),
}


def outputs_of(model, x):
    if isinstance(model, nn.ModuleDict):
        return model["head"](model["lstm"](x)[0][:, -1])
    return model(x)


def steps_beside_sgd(method, make, draw, names, plain=(), schedule=lambda optimizer: None):
    """Four steps of the method, and of SGD on a twin's parameters of the named modules.

    schedule : gives either of the two optimizers its scheduler.
    """
    model, twin = double_precision(make), double_precision(make)
    optimizer = method(model, LR, momentum=MOMENTUM, damping=0.1, plain=plain, **EVERY_STEP)
    owners = ["" if name == "the model" else name for name in names]
    pairs = [
        pair
        for name in owners
        for pair in zip(
            model.get_submodule(name).parameters(recurse=False),
            twin.get_submodule(name).parameters(recurse=False),
            strict=True,
        )
    ]
    sgd = torch.optim.SGD([q for _, q in pairs], LR, momentum=MOMENTUM)
    schedulers = [schedule(each) for each in (optimizer, sgd)]
    start = [p.detach().clone() for p, _ in pairs]
    for _ in range(4):
        optimizer.zero_grad()
        functional.cross_entropy(outputs_of(model, draw()), torch.arange(6) % CLASSES).backward()
        for p, q in pairs:
            q.grad = p.grad.clone()
        optimizer.step()
        sgd.step()
        for scheduler in filter(None, schedulers):
            scheduler.step()
    assert pairs
    for (p, q), before in zip(pairs, start, strict=True):
        assert torch.equal(p, q)
        assert not torch.equal(p, before)
    return optimizer


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", COVERED_BY_NOTHING)
def test_what_no_factorization_covers_takes_the_steps_of_sgd_and_repr_says_why(kind):
    make, draw, names, reason = COVERED_BY_NOTHING[kind]
    optimizer = steps_beside_sgd(TEKFAC, make, draw, names)
    lines = repr(optimizer).splitlines()
    for name in names:
        (line,) = [line for line in lines if line.strip().startswith(f"{name}:")]
        assert "plain SGD" in line
        assert any(word in line for word in reason.split("|"))


@pytest.mark.parametrize("kind", ASKED_FOR)
@every_method
def test_what_was_left_to_sgd_takes_its_steps(method, kind):
    make, draw, names = ASKED_FOR[kind]
    optimizer = steps_beside_sgd(method, make, draw, names, plain=names)
    assert "0: plain SGD (asked for)" in repr(optimizer)
    assert "3: factored" in repr(optimizer)


def test_with_the_whole_model_left_to_sgd_the_optimizer_is_sgd():
    everything = ["0", "3"]
    steps_beside_sgd(TEKFAC, ASKED_FOR["Linear"][0], numbers(4), everything, plain=everything)


def test_the_name_of_a_container_leaves_all_inside_it_to_sgd():
    model = nn.ModuleDict({"body": before_a_head(nn.Linear(4, 5)), "bodywork": nn.Linear(3, 3)})
    optimizer = TEKFAC(model, 0.1, plain="body")
    treated = {row.name: row.treatment for row in optimizer.report().rows}
    assert treated == {
        "body.0": "plain SGD (asked for)",
        "body.3": "plain SGD (asked for)",
        "bodywork": "factored",
    }


SCHEDULES = {
    "StepLR": lambda optimizer: StepLR(optimizer, step_size=2, gamma=0.1),
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, max_lr=0.3, total_steps=5),
    "CosineAnnealingLR": lambda optimizer: CosineAnnealingLR(optimizer, T_max=4),
    "LinearLR": lambda optimizer: LinearLR(optimizer, start_factor=0.1, total_iters=3),
}


@pytest.mark.parametrize("kind", SCHEDULES)
@every_method
def test_under_a_scheduler_they_take_the_steps_of_sgd_under_the_same(method, kind):
    """There is one lr, which schedulers write to; whatever they write is that of all parameters."""
    make, draw, names, _ = COVERED_BY_NOTHING["LayerNorm"]
    optimizer = steps_beside_sgd(method, make, draw, names, schedule=SCHEDULES[kind])
    assert len(optimizer.param_groups) == 1


@every_method
def test_in_flat_directions_factored_layers_take_the_steps_of_sgd_too(method):
    """λ (F̂ + λ)⁻¹ ∇ is ∇ where F̂ is nothing beside λ: lr is what it is for SGD, for all."""
    model, twin = (double_precision(lambda: before_a_head(nn.LayerNorm(5))) for _ in range(2))
    optimizer = method(model, LR, momentum=MOMENTUM, damping=1e12, **EVERY_STEP)
    sgd = torch.optim.SGD(twin.parameters(), LR, momentum=MOMENTUM)
    draw = numbers(5)
    for _ in range(3):
        x = draw()
        for network, each in ((model, optimizer), (twin, sgd)):
            each.zero_grad()
            functional.cross_entropy(network(x), torch.arange(6) % CLASSES).backward()
            each.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-5 * LR)


def test_weight_decay_of_the_others_is_decoupled_too():
    model = double_precision(lambda: before_a_head(nn.LayerNorm(5)))
    optimizer = TEKFAC(model, 0.2, weight_decay=0.1, momentum=0.0)
    functional.cross_entropy(model(numbers(5)()), torch.arange(6) % CLASSES).backward()
    p = model[0].weight
    expected = (1 - 0.2 * 0.1) * p.detach() - 0.2 * p.grad
    optimizer.step()
    assert torch.allclose(p, expected, rtol=1e-14, atol=0)
