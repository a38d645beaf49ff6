"""If this fails, a slip gives a wrong number in silence, or an error that explains nothing."""

import re

import numpy as np
import pytest

import tekfac_edu.reference as reference
from tekfac_edu.reference import (
    EKFAC,
    KFAC,
    MLP,
    TEKFAC,
    TKFAC,
    Added,
    ByTrace,
    GradientDescent,
    KFACFactors,
    LayerStatistics,
    NaturalGradient,
    Paper,
    TraceRestrictedFactors,
    averaged,
    corrected_eigenvalues,
    eigenbasis,
    exact_fisher,
    fisher_block,
    fisher_matrix,
    kfac_damping,
    kfac_factors,
    kfac_pi,
    kron_apply,
    kronecker_power_iteration,
    move_eigenvalues,
    nearest_kronecker_product,
    partial_traces,
    precondition,
    qr_iteration,
    rearrange,
    split_vecs,
    stack_vecs,
    to_row_order,
    trace_restricted_factors,
    unrearrange,
    unvec,
    vec,
)

from .methods import every_method

NOT_FINITE = r"nan|inf|finite"
ones = np.ones


def filled(shape, value):
    """Ones with one bad entry."""
    x = ones(shape)
    x.flat[-1] = value
    return x


def refuses(argument, got, call, *args, **kwargs):
    """A ValueError whose message has the argument's name as a word, and what it got."""
    with pytest.raises(ValueError) as error:
        call(*args, **kwargs)
    message = str(error.value)
    assert re.search(rf"(?<![\w']){re.escape(argument)}(?![\w'])", message), message
    assert re.search(got, message, re.IGNORECASE), message


FROM_A_AND_G = {
    "fisher_block": fisher_block,
    "kfac_factors": kfac_factors,
    "trace_restricted_factors": trace_restricted_factors,
    "KFAC.fit": KFAC.fit,
    "EKFAC.fit": EKFAC.fit,
    "TKFAC.fit": TKFAC.fit,
    "TEKFAC.fit": TEKFAC.fit,
    "corrected_eigenvalues": lambda a, g: corrected_eigenvalues(a, g, np.eye(3), np.eye(2)),
    "fisher_matrix": lambda a, g: fisher_matrix([LayerStatistics(a, g)]),
}
# argument at fault, what the message must show, a, g
BAD_A_AND_G = {
    "a has nan": ("a", NOT_FINITE, filled((4, 3), np.nan), ones((4, 2))),
    "a has inf": ("a", NOT_FINITE, filled((4, 3), np.inf), ones((4, 2))),
    "g has nan": ("g", NOT_FINITE, ones((4, 3)), filled((4, 2), np.nan)),
    "g has -inf": ("g", NOT_FINITE, ones((4, 3)), filled((4, 2), -np.inf)),
    "no examples": ("a", r"\(0, 3\)|empty", ones((0, 3)), ones((0, 2))),
    "no inputs": ("a", r"\(4, 0\)|empty", ones((4, 0)), ones((4, 2))),
    "no outputs": ("g", r"\(4, 0\)|empty", ones((4, 3)), ones((4, 0))),
    "no positions": ("a", r"\(4, 0, 3\)|empty", ones((4, 0, 3)), ones((4, 0, 2))),
    "no vectors": ("g", r"\(0, 4, 2\)|empty", ones((4, 3)), ones((0, 4, 2))),
    "other N": ("g", r"\(5,", ones((4, 3)), ones((5, 2))),
    "other N, one": ("g", r"\(1,", ones((4, 3)), ones((1, 2))),
    "other N, vectors": ("g", r"\((2, )?5,", ones((4, 3)), ones((2, 5, 2))),
    "other T": ("g", r"\(4, 6", ones((4, 5, 3)), ones((4, 6, 2))),
    "other T, vectors": ("g", r"\((2, )?4, 1", ones((4, 5, 3)), ones((2, 4, 1, 2))),
    "vectors last": ("g", r"\((4, )?2,", ones((4, 3)), ones((4, 2, 6))),
    "a is a vector": ("a", r"\(3,\)", ones(3), ones(2)),
    "a has four axes": ("a", r"\(4, 2, 2, 3\)", ones((4, 2, 2, 3)), ones((4, 2, 2, 2))),
    "g lacks an axis": ("g", r"\(4, 2\)", ones((4, 5, 3)), ones((4, 2))),
    "g has two axes more": ("g", r"\(1, 2, 4, 2\)", ones((4, 3)), ones((1, 2, 4, 2))),
    "a is complex": ("a", "complex", ones((4, 3)) * 1j, ones((4, 2))),
    "g is complex": ("g", "complex", ones((4, 3)), ones((4, 2)) * (1 + 0j)),
    "a is text": ("a", "str|<U|text|dtype", np.full((4, 3), "one"), ones((4, 2))),
    "a is ragged": ("a", "", [[1.0, 2.0, 3.0], [1.0]], ones((2, 2))),
    "g is None": ("g", "None|object|dtype", ones((4, 3)), None),
}


@pytest.mark.parametrize("case", BAD_A_AND_G)
@pytest.mark.parametrize("call", FROM_A_AND_G)
def test_a_and_g(call, case):
    argument, got, a, g = BAD_A_AND_G[case]
    refuses(argument, got, FROM_A_AND_G[call], a, g)


BAD_DAMPING = {
    "negative": (-1e-3, r"-0\.001|-1e-0?3"),
    "nan": (np.nan, "nan"),
    "negative infinity": (-np.inf, "-inf"),
    "text": ("0.1", "0.1"),
    "array": (np.array([0.1, 0.2]), r"0\.1|\(2,\)|array"),
    "None": (None, "None"),
}


def fitted(method):
    rng = np.random.default_rng(0)
    return method.fit(rng.normal(size=(6, 3)), rng.normal(size=(6, 2)))


@every_method
@pytest.mark.parametrize("case", BAD_DAMPING)
def test_damping(method, case):
    damping, got = BAD_DAMPING[case]
    refuses("damping", got, fitted(method).precondition, ones((2, 3)), damping)
    refuses("damping", got, fitted(method).dense, damping)
    refuses("damping", got, fitted(method).dense, damping=damping)


@every_method
@pytest.mark.parametrize(
    ("M", "got"),
    [
        (ones((3, 2)), r"\(3, 2\)"),
        (ones((2, 4)), r"\(2, 4\)"),
        (ones((1, 3)), r"\(1, 3\)"),
        (ones(6), r"\(6,\)"),
        (ones((1, 2, 3)), r"\(1, 2, 3\)"),
        (filled((2, 3), np.nan), NOT_FINITE),
        (filled((2, 3), np.inf), NOT_FINITE),
        (ones((2, 3)) * 1j, "complex"),
    ],
)
def test_the_gradient_to_precondition(method, M, got):
    refuses("M", got, fitted(method).precondition, M, 0.1)


@every_method
def test_what_would_be_right_is_said(method):
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        fitted(method).precondition(ones((3, 2)), 0.1)


KRONECKER = {
    "vec of a vector": ("M", r"\(3,\)", vec, ones(3)),
    "vec of a stack": ("M", r"\(2, 3, 4\)", vec, ones((2, 3, 4))),
    "unvec, other length": ("v", r"\(5,\)|5", unvec, ones(5), 2, 3),
    "unvec of a matrix": ("v", r"\(2, 3\)", unvec, ones((2, 3)), 2, 3),
    "unvec, sizes negative": ("d_out", "-2", unvec, ones(6), -2, -3),
    "kron_apply, A": ("A", r"\(2, 2\)", kron_apply, np.eye(2), np.eye(2), ones((2, 3))),
    "kron_apply, B": ("B", r"\(3, 3\)", kron_apply, np.eye(3), np.eye(3), ones((2, 3))),
    "kron_apply, M": ("M", r"\(6,\)", kron_apply, np.eye(3), np.eye(2), ones(6)),
    "to_row_order, size": ("F", r"\(6, 6\)", to_row_order, np.eye(6), 2, 2),
    "to_row_order, square": ("F", r"\(6, 5\)", to_row_order, ones((6, 5)), 3, 2),
    "rearrange, size": ("F", r"\(6, 6\)", rearrange, np.eye(6), 2, 2),
    "rearrange, square": ("F", r"\(6, 5\)", rearrange, ones((6, 5)), 3, 2),
    "unrearrange": ("R", r"\(4, 9\)", unrearrange, ones((4, 9)), 3, 2),
    "partial_traces": ("F", r"\(6, 6\)", partial_traces, np.eye(6), 2, 2),
    "nearest, size": ("F", r"\(6, 6\)", nearest_kronecker_product, np.eye(6), 4, 2),
    "nearest, nan": ("F", NOT_FINITE, nearest_kronecker_product, filled((6, 6), np.nan), 3, 2),
    "power, size": ("F", r"\(6, 6\)", kronecker_power_iteration, np.eye(6), 4, 2, 1),
    "power, no steps": ("steps", "0", kronecker_power_iteration, np.eye(6), 3, 2, 0),
    "power, half a step": ("steps", r"1\.5", kronecker_power_iteration, np.eye(6), 3, 2, 1.5),
    "stack_vecs of a vector": ("matrices", r"\(3,\)", stack_vecs, [ones((2, 2)), ones(3)]),
    "stack_vecs of nothing": ("matrices", "", stack_vecs, []),
    "split_vecs, too short": ("v", "9|10", split_vecs, ones(9), [(2, 3), (2, 2)]),
    "split_vecs, too long": ("v", "11|10", split_vecs, ones(11), [(2, 3), (2, 2)]),
}


@pytest.mark.parametrize("case", KRONECKER)
def test_kronecker(case):
    argument, got, call, *args = KRONECKER[case]
    refuses(argument, got, call, *args)


D, Q3, Q2 = ones((2, 3)), np.eye(3), np.eye(2)
EIGEN = {
    "eigenbasis, shape": ("S", r"\(2, 3\)", eigenbasis, ones((2, 3))),
    "eigenbasis, nan": ("S", NOT_FINITE, eigenbasis, filled((2, 2), np.nan)),
    "eigenbasis, not symmetric": ("S", "symmetric", eigenbasis, np.array([[1.0, 2.0], [0.0, 1.0]])),
    "eigenbasis, negative": ("S", "-1", eigenbasis, np.diag([1.0, -1.0])),
    "eigenbasis, not symmetric, tiny": (
        "S",
        "symmetric",
        eigenbasis,
        1e-60 * np.array([[1.0, 0.5], [0.0, 1.0]]),
    ),
    "eigenbasis, negative, tiny": ("S", "-1", eigenbasis, 1e-60 * np.diag([1.0, -1.0])),
    "qr_iteration, Q": ("Q", r"\(3, 3\)", qr_iteration, Q2, Q3),
    "qr_iteration, S": ("S", r"\(2, 3\)", qr_iteration, D, Q3),
    "corrected, Q_in": (
        "Q_in",
        r"\(4, 4\)",
        corrected_eigenvalues,
        ones((5, 3)),
        ones((5, 2)),
        np.eye(4),
        Q2,
    ),
    "corrected, Q_out": (
        "Q_out",
        r"\(3, 3\)",
        corrected_eigenvalues,
        ones((5, 3)),
        ones((5, 2)),
        Q3,
        Q3,
    ),
    "move, D": ("D", r"\(3, 2\)", move_eigenvalues, D.T, Q3, Q2, Q3, Q2),
    "move, old basis": ("Q_in_old", r"\(3, 2\)", move_eigenvalues, D, ones((3, 2)), Q2, Q3, Q2),
    "move, new basis": ("Q_out_new", r"\(3, 3\)", move_eigenvalues, D, Q3, Q2, Q3, Q3),
    "kfac_pi, a matrix": ("mean_in", r"1\.", kfac_pi, D, 1.0),
    "kfac_pi, negative": ("mean_in", "-1", kfac_pi, -1.0, 1.0),
    "kfac_pi, nan": ("mean_out", "nan", kfac_pi, 1.0, np.nan),
    "kfac_damping, mean": ("mean_out", "-1", kfac_damping, 1.0, -1.0, 0.1),
    "kfac_damping, damping": ("damping", "-1", kfac_damping, 1.0, 1.0, -1.0),
    "Paper": ("damping", "-1", Paper, -1.0),
    "Added": ("damping", "nan", Added, np.nan),
    "ByTrace, damping": ("damping", "-1", ByTrace, -1.0),
    "ByTrace, floor": ("floor", "-1", ByTrace, 1.0, 1.0, -1.0),
    "ByTrace, multiplier": ("multiplier", "0", ByTrace, 1.0, 0.0),
    "precondition, M": ("M", r"\(3, 2\)", precondition, D.T, Q3, Q2, D),
    "precondition, nan": ("M", NOT_FINITE, precondition, filled((2, 3), np.nan), Q3, Q2, D),
    "precondition, Q_in": ("Q_in", r"\(2, 2\)", precondition, D, Q2, Q2, D),
    "precondition, D_damped": ("D_damped", r"0\.0", precondition, D, Q3, Q2, filled((2, 3), 0.0)),
    "precondition, D_damped nan": ("D_damped", "nan", precondition, D, Q3, Q2, np.nan * D),
    "TEKFAC, eigenvalues": ("eigenvalues", r"\(3, 2\)", TEKFAC, Q3, Q2, D.T),
    "EKFAC, eigenvalues": ("eigenvalues", r"\(3, 2\)", EKFAC, Q3, Q2, D.T),
    "TEKFAC, negative": ("eigenvalues", "-1", TEKFAC, Q3, Q2, -D),
    "EKFAC, nan": ("eigenvalues", NOT_FINITE, EKFAC, Q3, Q2, filled((2, 3), np.nan)),
}


@pytest.mark.parametrize("case", EIGEN)
def test_eigenbases_and_eigenvalues(case):
    argument, got, call, *args = EIGEN[case]
    refuses(argument, got, call, *args)


KFAC_PAIR = KFACFactors(np.eye(3), np.eye(2))
TRACE_PAIR = TraceRestrictedFactors(1.0, np.eye(3) / 3, np.eye(2) / 2)


@pytest.mark.parametrize("factors", [KFAC_PAIR, TRACE_PAIR], ids=lambda f: type(f).__name__)
@pytest.mark.parametrize(("decay", "got"), [(-0.1, r"-0\.1"), (1.5, r"1\.5"), (np.nan, "nan")])
def test_decay(factors, decay, got):
    refuses("decay", got, averaged, factors, factors, decay)


def test_averages_of_other_sizes_or_kinds():
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        averaged(KFAC_PAIR, KFACFactors(np.eye(2), np.eye(2)), 0.5)
    with pytest.raises(ValueError, match=r"\(1, 1\)"):  # NumPy would broadcast
        averaged(KFAC_PAIR, KFACFactors(np.eye(1), np.eye(2)), 0.5)
    with pytest.raises(ValueError, match=r"\(4, 4\)"):
        averaged(TRACE_PAIR, TraceRestrictedFactors(1.0, np.eye(4) / 4, np.eye(2) / 2), 0.5)
    with pytest.raises(ValueError, match="KFACFactors"):
        averaged(TRACE_PAIR, KFAC_PAIR, 0.5)


def mlp():
    return MLP((3, 4, 2), rng=0)


x, labels, targets = ones((5, 3)), np.zeros(5, dtype=int), ones((5, 2))
NETWORK = {
    "one width": ("widths", r"\(?3", MLP, (3,)),
    "no width": ("widths", r"\(\)|\[\]|empty|least", MLP, ()),
    "width 0": ("widths", "0", MLP, (3, 0, 2)),
    "width 2.5": ("widths", r"2\.5", MLP, (3, 2.5, 2)),
    "activation": ("activation", "swish", MLP, (3, 2), "swish"),
    "rng": ("rng", "seven", MLP, (3, 2), "tanh", "seven"),
    "x too wide": ("x", r"\(5, 4\)", lambda: mlp().forward(ones((5, 4)))),
    "x a vector": ("x", r"\(3,\)", lambda: mlp().forward(ones(3))),
    "x empty": ("x", r"\(0, 3\)|empty", lambda: mlp().forward(ones((0, 3)))),
    "x nan": ("x", NOT_FINITE, lambda: mlp().forward(filled((5, 3), np.nan))),
    "x inf": ("x", NOT_FINITE, lambda: mlp().layer_statistics(filled((5, 3), np.inf))),
    "x in exact_fisher": ("x", r"\(5, 4\)", lambda: exact_fisher(mlp(), ones((5, 4)))),
    "x in gradients": ("x", r"\(5, 4\)", lambda: mlp().gradients(ones((5, 4)), labels)),
    "fisher": ("fisher", "type-2", lambda: mlp().layer_statistics(x, fisher="type-2")),
    "loss": ("loss", "hinge", lambda: mlp().loss(x, labels, loss="hinge")),
    "loss, gradients": ("loss", "hinge", lambda: mlp().gradients(x, labels, loss="hinge")),
    "loss, statistics": ("loss", "hinge", lambda: mlp().layer_statistics(x, loss="hinge")),
    "loss, exact_fisher": ("loss", "hinge", lambda: exact_fisher(mlp(), x, loss="hinge")),
    "mc without rng": ("rng", "None|mc", lambda: mlp().layer_statistics(x, fisher="mc")),
    "mc with a seed": ("rng", "7|int", lambda: mlp().layer_statistics(x, fisher="mc", rng=7)),
    "no samples": (
        "num_samples",
        "0",
        lambda: mlp().layer_statistics(x, fisher="mc", rng=np.random.default_rng(0), num_samples=0),
    ),
    "empirical without y": (
        "y",
        "None|empirical",
        lambda: mlp().layer_statistics(x, fisher="empirical"),
    ),
}


@pytest.mark.parametrize("case", NETWORK)
def test_network(case):
    argument, got, call, *args = NETWORK[case]
    refuses(argument, got, call, *args)


BAD_TARGETS = {
    "label too large": ("cross_entropy", np.array([0, 1, 2, 0, 0]), "2"),
    "label negative": ("cross_entropy", np.array([0, 1, -1, 0, 0]), "-1"),
    "labels as floats": ("cross_entropy", np.zeros(5), "float"),
    "labels as booleans": ("cross_entropy", np.zeros(5, dtype=bool), "bool"),
    "labels one-hot": ("cross_entropy", np.zeros((5, 2), dtype=int), r"\(5, 2\)"),
    "too few labels": ("cross_entropy", labels[:4], r"\(4,\)"),
    "one label": ("cross_entropy", labels[:1], r"\(1,\)"),
    "targets flat": ("squared_error", ones(5), r"\(5,\)"),
    "targets too narrow": ("squared_error", ones((5, 1)), r"\(5, 1\)"),
    "too few targets": ("squared_error", ones((1, 2)), r"\(1, 2\)"),
    "target nan": ("squared_error", filled((5, 2), np.nan), NOT_FINITE),
    "no target": ("squared_error", None, "None|object|dtype|give y"),
    "no label": ("cross_entropy", None, "None|object|dtype|give y"),
}


@pytest.mark.parametrize("case", BAD_TARGETS)
def test_targets(case):
    loss, y, got = BAD_TARGETS[case]
    refuses("y", got, mlp().loss, x, y, loss=loss)
    refuses("y", got, mlp().gradients, x, y, loss=loss)
    refuses("y", got, mlp().layer_statistics, x, y, fisher="empirical", loss=loss)


def test_layers_of_other_batches_make_no_full_matrix():
    layers = [
        LayerStatistics(ones((5, 3)), ones((5, 2))),
        LayerStatistics(ones((4, 3)), ones((4, 2))),
    ]
    with pytest.raises(ValueError, match=r"statistics"):
        fisher_matrix(layers)
    with pytest.raises(ValueError, match=r"statistics"):
        fisher_matrix([])


DESCENT = {
    "method": ("method", "shampoo", {"method": "shampoo"}),
    "lr 0": ("lr", "0", {"lr": 0.0}),
    "lr negative": ("lr", "-1", {"lr": -1.0}),
    "lr nan": ("lr", "nan", {"lr": np.nan}),
    "damping negative": ("damping", "-1", {"damping": -1.0}),
    "damping nan": ("damping", "nan", {"damping": np.nan}),
    "momentum 1": ("momentum", "1", {"momentum": 1.0}),
    "momentum negative": ("momentum", r"-0\.5", {"momentum": -0.5}),
    "loss": ("loss", "hinge", {"loss": "hinge"}),
    "fisher": ("fisher", "type-2", {"fisher": "type-2"}),
    "damping, a rule of text": ("damping", "paper", {"damping": "paper"}),
    "interval": ("interval", "0", {"interval": 0}),
    "interval of the factors": ("interval", "0", {"interval": (0, 1, 1)}),
    "interval of the bases": ("interval", r"1\.5", {"interval": (1, 1.5, 1)}),
    "interval of the eigenvalues": ("interval", "-1", {"interval": [1, 1, -1]}),
    "two intervals": ("interval", r"\(1, 2\)", {"interval": (1, 2)}),
    "decay": ("decay", r"1\.1", {"decay": 1.1}),
    "decay nan": ("decay", "nan", {"decay": np.nan}),
    "basis": ("basis", "svd", {"basis": "svd"}),
    "qr without measuring": ("basis", "kfac", {"basis": "qr", "method": "kfac"}),
    "lr_scale": ("lr_scale", "adam", {"lr_scale": "adam"}),
    "mc without rng": ("rng", "None|mc", {"fisher": "mc"}),
}


@pytest.mark.parametrize("case", DESCENT)
def test_descent(case):
    argument, got, changed = DESCENT[case]
    settings = {"method": "tekfac", "lr": 0.1, "damping": 0.1, "fisher": "exact", **changed}
    refuses(argument, got, lambda: NaturalGradient(mlp(), **settings).step(x, labels))


def test_gradient_descent():
    refuses("lr", "-1", GradientDescent, mlp(), -1.0)
    refuses("momentum", "2", GradientDescent, mlp(), 0.1, momentum=2.0)


@pytest.mark.parametrize(
    ("argument", "got", "changed"),
    [
        ("epochs", "0", {"epochs": 0}),
        ("batch_size", "0", {"batch_size": 0}),
        ("rng", "7|int", {"rng": 7}),
    ],
)
def test_training(argument, got, changed):
    settings = {"epochs": 1, "batch_size": 2, "rng": np.random.default_rng(0), **changed}
    optimizer = GradientDescent(mlp(), 0.1)
    refuses(argument, got, reference.train, optimizer, x, labels, **settings)
