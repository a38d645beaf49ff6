"""If this fails, a wrong use is accepted in silence, or refused without saying what to do."""

import re

import pytest
import torch
from torch import nn

from tekfac_edu.optim import EKFAC, KFAC, TEKFAC, TKFAC
from tekfac_edu.optim.optimizer import KroneckerOptimizer

from .networks import CLASSES, batches, mlp
from .training import EVERY_STEP, METHODS, parameters, train

OUT_OF_BOUNDS = {
    "lr": [-0.1, float("nan"), float("inf"), "0.1", None, True],
    "momentum": [-0.1, 1.0, float("nan"), None],
    "weight_decay": [-1e-4, float("inf")],
    "damping": [0.0, -1.0, float("nan"), "1e-2"],
    "damping_policy": ["Trace", None, 1],
    "damping_rule": ["split", ""],
    "trace_multiplier": [0.0, -1.0, float("inf")],
    "trace_floor": [0.0, -1e-8, float("nan")],
    "fisher": ["Empirical", "type2", None],
    "factor_interval": [0, -1, 2.0, True],
    "eigen_interval": [0, 1.5, "10"],
    "scale_interval": [0, float("inf")],
    "warmup_steps": [-1, 1.5, True],
    "factor_decay": [-0.1, 1.1, float("nan")],
    "scale_decay": [-0.1, 1.1, None],
    "eigenbasis": ["svd", True],
    "lr_scale": ["adam", None],
    "lr_other": [-0.1, float("nan"), "0.1"],
    "process_group": ["world", 3],
    "generator": [0, "seed"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in OUT_OF_BOUNDS for value in OUT_OF_BOUNDS[name]]
)
def test_every_setting_has_bounds_and_its_message_names_it(name, value):
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b.*{re.escape(repr(value))}"):
        TEKFAC(mlp(), **({"lr": 0.1} | {name: value}))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_the_ends_of_every_range_are_accepted(method):
    model = mlp()
    optimizer = method(
        model,
        0,
        momentum=0,
        weight_decay=0,
        damping=1e-30,
        factor_decay=0,
        scale_decay=1,
        lr_other=0,
        **EVERY_STEP,
    )
    before = parameters(model)
    train(model, optimizer, batches((4,), 2))
    assert torch.equal(parameters(model), before)


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "damping", "lr_other"])
def test_the_settings_of_a_group_have_the_same_bounds(name):
    model = mlp()
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        TEKFAC(model, 0.1, param_groups=[{"params": model[0].parameters(), name: -1.0}])


@pytest.mark.parametrize("method", [KFAC, TKFAC])
def test_methods_that_need_eigenvalues_of_their_factors_refuse_qr(method):
    with pytest.raises(ValueError, match=f"eigenbasis.*{method.__name__}"):
        method(mlp(), 0.1, eigenbasis="qr")


@pytest.mark.parametrize("method", [EKFAC, TEKFAC])
def test_corrected_methods_take_qr(method):
    method(mlp(), 0.1, eigenbasis="qr")


def test_what_the_four_share_is_no_optimizer_by_itself():
    with pytest.raises(TypeError, match="TEKFAC"):
        KroneckerOptimizer(mlp(), 0.1)


def test_parameters_in_place_of_the_model_are_refused():
    """The habit from torch.optim: SGD(model.parameters(), lr)."""
    with pytest.raises((TypeError, ValueError), match="model"):
        TEKFAC(mlp().parameters(), 0.1)


def with_odd(module):
    return nn.ModuleDict({"trunk": nn.Linear(2, 2), "odd": module})


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv1d(4, 4, 1, groups=4), "groups=4"),
        (nn.Conv2d(4, 4, 1, groups=2), "groups=2"),
        (nn.Conv3d(1, 1, 1), "Conv3d"),
        (nn.ConvTranspose1d(1, 1, 1), "ConvTranspose1d"),
        (nn.ConvTranspose2d(1, 1, 1), "ConvTranspose2d"),
        (nn.Bilinear(2, 2, 2), "Bilinear"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value,
)
def test_a_module_that_cannot_be_factored_is_named_with_its_remedy(module, reason):
    with pytest.raises(ValueError, match=rf"odd.*{reason}.*plain_sgd=\['odd'\]"):
        TEKFAC(with_odd(module), 0.1)
    TEKFAC(with_odd(module), 0.1, plain_sgd=["odd"])


@pytest.mark.parametrize("module", [nn.LazyLinear(2), nn.LazyConv1d(2, 1), nn.LazyConv2d(2, 1)])
def test_a_module_without_a_size_yet_is_refused(module):
    with pytest.raises(ValueError, match=r"odd.*forward"):
        TEKFAC(with_odd(module), 0.1)


def test_tied_weights_are_refused_with_both_names_and_trained_plainly_if_asked():
    def tied():
        model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "out": nn.Linear(3, 5, bias=False)})
        model["out"].weight = model["embed"].weight
        return model

    with pytest.raises(ValueError, match=r"out.*embed.*plain_sgd"):
        TEKFAC(tied(), 0.1)
    TEKFAC(tied(), 0.1, plain_sgd=["out", "embed"])


def test_the_same_module_under_two_names_is_one_layer():
    inner = nn.Linear(4, 4)
    model = nn.Sequential(inner, nn.Tanh(), inner, nn.Linear(4, CLASSES)).double()
    optimizer = TEKFAC(model, 0.1, **EVERY_STEP)
    train(model, optimizer, batches((4,), 2))
    assert [row.name for row in optimizer.report().rows] == ["0", "3"]


def test_data_parallel_is_refused():
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        TEKFAC(nn.DataParallel(mlp()), 0.1)


def test_an_unknown_name_in_plain_sgd_is_refused_and_the_known_are_listed():
    with pytest.raises(ValueError, match=r"plain_sgd.*'3'.*'0', '1', '2'"):
        TEKFAC(mlp(), 0.1, plain_sgd=["3"])


def test_groups_with_strangers_or_with_a_parameter_twice_are_refused():
    model = mlp()
    with pytest.raises(ValueError, match=r"param_groups.*\(7, 7\)"):
        TEKFAC(model, 0.1, param_groups=[{"params": [torch.zeros(7, 7)]}])
    with pytest.raises(ValueError, match="more than one"):
        TEKFAC(model, 0.1, param_groups=[{"params": [model[0].weight]}] * 2)
