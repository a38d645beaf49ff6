"""If this fails, a wrong use is accepted in silence, or refused without saying what to do."""

import inspect
import re
from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from tekfac_edu.optim import EKFAC, KFAC, TEKFAC, TKFAC, Added, ByTrace, Cost, Paper
from tekfac_edu.optim.optimizer import KroneckerOptimizer
from tekfac_edu.optim.settings import LOW, REPLACED

from .networks import CLASSES, batches, mlp
from .training import EVERY_STEP, all_finite, every_method, parameters, train

OUT_OF_BOUNDS = {
    "lr": [-0.1, float("nan"), float("inf"), "0.1", None, True],
    "momentum": [-0.1, 1.0, float("nan"), None],
    "weight_decay": [-1e-4, float("inf")],
    "damping": [0.0, -1.0, float("nan"), "1e-2", None],
    "fisher": ["Empirical", "type2", None],
    "interval": [0, -1, 2.0, True, "10", None, (1, 1), (1, 2, 3, 4), (1, 0, 1), (2, 1.5, 1)],
    "warmup": [-1, 1.5, True],
    "decay": [-0.1, 1.1, float("nan"), None],
    "cost": ["Low", None, {"input_rank": 3}, Cost],
    "process_group": ["world", 3],
}
IN_A_COST = {
    "factor_rows": [0, -1.0, float("inf"), "2"],
    "eigenvalue_examples": [0, -1, 2.0, True],
    "input_rank": [0, 1.5, "128"],
    "eigenbasis": ["svd", True, None],
    "stagger": ["yes", 1, 0, None],
    "precision": ["float16", None],
}
IN_A_RULE = {
    "damping": [0.0, -1.0, float("nan"), "1e-2", None],
    "multiplier": [0.0, -1.0, float("inf")],
    "floor": [0.0, -1e-8, float("nan")],
}


def each_of(table):
    """Every name with every value that it may not have."""
    return pytest.mark.parametrize(
        ("name", "value"), [(name, value) for name in table for value in table[name]]
    )


def named(name, value):
    """The message has the argument, and what it got: of a triple, the number that is wrong."""
    wrong = [steps for steps in value if steps in (0, 1.5)] if isinstance(value, tuple) else []
    return rf"\b{name}\b.*{re.escape(repr(wrong[0] if wrong else value))}"


@each_of(OUT_OF_BOUNDS)
def test_every_setting_has_bounds_and_its_message_names_it(name, value):
    with pytest.raises(ValueError, match=named(name, value)):
        TEKFAC(mlp(), **({"lr": 0.1} | {name: value}))


@each_of(IN_A_COST)
def test_every_part_of_a_cost_has_bounds_and_its_message_names_it(name, value):
    with pytest.raises(ValueError, match=named(name, value)):
        Cost(**{name: value})


@each_of(IN_A_RULE)
def test_every_number_of_a_rule_has_bounds_and_its_message_names_it(name, value):
    for rule in (Paper, Added, ByTrace) if name == "damping" else (ByTrace,):
        with pytest.raises(ValueError, match=named(name, value)):
            rule(**({"damping": 0.1} | {name: value}))


@pytest.mark.parametrize("name", REPLACED)
def test_an_argument_of_the_first_edition_says_what_replaces_it(name):
    """And what it says is there: an argument of today, or of a Cost or rule."""
    with pytest.raises(TypeError, match=rf"^{name} is now ") as error:
        TEKFAC(mlp(), 0.1, **{name: 1})
    text = str(error.value).removeprefix(f"{name} is now ")
    today = set(inspect.signature(TEKFAC.__init__).parameters)
    assert today & set(re.findall(r"\w+", text)) or "torch.manual_seed" in text
    for kind in (Cost, Added, ByTrace):
        for inside in re.findall(rf"{kind.__name__}\(.*?(\w+)=", text):
            assert inside in {field.name for field in fields(kind)}


def test_all_arguments_of_the_first_edition_are_known():
    first = """lr momentum weight_decay damping damping_policy damping_rule trace_multiplier
        trace_floor fisher factor_interval eigen_interval scale_interval warmup_steps factor_decay
        scale_decay eigenbasis input_rank factor_rows scale_examples stagger precision lr_scale
        lr_other plain_sgd param_groups process_group generator"""
    today = inspect.signature(TEKFAC.__init__).parameters
    assert set(first.split()) - set(today) == set(REPLACED)


def test_an_argument_that_never_was_is_a_type_error():
    with pytest.raises(TypeError, match="nesterov"):
        TEKFAC(mlp(), 0.1, nesterov=True)


@every_method
def test_the_ends_of_every_range_are_accepted(method):
    for decay in (0, 1):
        model = mlp()
        settings = {"momentum": 0, "weight_decay": 0, "damping": 1e-30, "decay": decay}
        optimizer = method(model, 0, **settings, **EVERY_STEP)
        before = parameters(model)
        train(model, optimizer, batches((4,), 2))
        assert torch.equal(parameters(model), before)


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "damping"])
def test_the_settings_of_a_group_have_the_same_bounds(name):
    model = mlp()
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        TEKFAC(model, 0.1, param_groups=[{"params": model[0].parameters(), name: -1.0}])
    optimizer = TEKFAC(model, 0.1)
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        optimizer.add_param_group({"params": [torch.zeros(3, requires_grad=True)], name: -1.0})
    assert len(optimizer.param_groups) == 1


def test_a_group_with_a_learning_rate_for_the_others_is_refused():
    model = mlp()
    with pytest.raises(TypeError, match="lr_other"):
        TEKFAC(model, 0.1, param_groups=[{"params": model[0].parameters(), "lr_other": 0.1}])


@pytest.mark.parametrize("method", [KFAC, TKFAC])
def test_methods_that_need_eigenvalues_of_their_factors_refuse_qr(method):
    with pytest.raises(ValueError, match=r"eigenbasis.*KFAC and TKFAC"):
        method(mlp(), 0.1, cost=Cost(eigenbasis="qr"))


@pytest.mark.parametrize("method", [EKFAC, TEKFAC])
def test_corrected_methods_take_qr(method):
    method(mlp(), 0.1, cost=Cost(eigenbasis="qr"))


@every_method
def test_all_take_the_cost_that_is_called_low(method):
    model = mlp()
    optimizer = method(model, 0.1, cost="low")
    corrected = "eigenvalues" in method.stages()
    expected = LOW if corrected else replace(LOW, eigenbasis="eigh")
    assert optimizer.settings.cost == expected
    train(model, optimizer, batches((4,), 2))
    assert all_finite(model, optimizer)


def test_exact_is_the_cost_of_no_saving_and_the_default():
    for optimizer in (TEKFAC(mlp(), 0.1), TEKFAC(mlp(), 0.1, cost="exact")):
        assert optimizer.settings.cost == Cost()


HALVES = {"weight": r"0 \(Linear\).*\b0.5.*\b0.01", "bias": r"0 \(Linear\).*\b0.01.*\b0.5"}


@pytest.mark.parametrize("half", HALVES)
def test_weight_and_bias_of_a_layer_in_groups_of_different_damping_are_refused(half):
    """They are one matrix: else a damping that was asked for is not used, and nobody is told."""
    model = mlp()
    own = {"params": [getattr(model[0], half)], "lr": 0.5}
    TEKFAC(model, 0.1, param_groups=[own])
    with pytest.raises(ValueError, match=HALVES[half]):
        TEKFAC(model, 0.1, param_groups=[own | {"damping": 0.5}])


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
        (nn.Conv3d(1, 1, 1), "Conv3d"),
        (nn.ConvTranspose1d(1, 1, 1), "ConvTranspose1d"),
        (nn.ConvTranspose2d(1, 1, 1), "ConvTranspose2d"),
        (nn.Bilinear(2, 2, 2), "Bilinear"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value,
)
def test_a_module_that_cannot_be_factored_is_named_with_its_remedy(module, reason):
    with pytest.raises(ValueError, match=rf"odd.*{reason}.*plain=\['odd'\]"):
        TEKFAC(with_odd(module), 0.1)
    TEKFAC(with_odd(module), 0.1, plain=["odd"])


@pytest.mark.parametrize("module", [nn.LazyLinear(2), nn.LazyConv1d(2, 1), nn.LazyConv2d(2, 1)])
def test_a_module_without_a_size_yet_is_refused(module):
    with pytest.raises(ValueError, match=r"odd.*forward"):
        TEKFAC(with_odd(module), 0.1)


def test_tied_weights_are_refused_with_both_names_and_trained_plainly_if_asked():
    def tied():
        model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "out": nn.Linear(3, 5, bias=False)})
        model["out"].weight = model["embed"].weight
        return model

    with pytest.raises(ValueError, match=r"out.*embed.*plain"):
        TEKFAC(tied(), 0.1)
    TEKFAC(tied(), 0.1, plain=["out", "embed"])


def test_the_same_module_under_two_names_is_one_layer():
    inner = nn.Linear(4, 4)
    model = nn.Sequential(inner, nn.Tanh(), inner, nn.Linear(4, CLASSES)).double()
    optimizer = TEKFAC(model, 0.1, **EVERY_STEP)
    train(model, optimizer, batches((4,), 2))
    assert [row.name for row in optimizer.report().rows] == ["0", "3"]


def test_data_parallel_is_refused():
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        TEKFAC(nn.DataParallel(mlp()), 0.1)


def test_an_unknown_name_in_plain_is_refused_and_the_known_are_listed():
    with pytest.raises(ValueError, match=r"plain.*'3'.*'0', '1', '2'"):
        TEKFAC(mlp(), 0.1, plain=["3"])


def test_groups_with_strangers_or_with_a_parameter_twice_are_refused():
    model = mlp()
    with pytest.raises(ValueError, match=r"param_groups.*\(7, 7\)"):
        TEKFAC(model, 0.1, param_groups=[{"params": [torch.zeros(7, 7)]}])
    with pytest.raises(ValueError, match="more than one"):
        TEKFAC(model, 0.1, param_groups=[{"params": [model[0].weight]}] * 2)
