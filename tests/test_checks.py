"""If this fails, a check mark in the book may stand beside a claim that is false."""

import numpy as np
import pytest

from tekfac_edu.checks import check


def test_prints_one_line_that_does_not_depend_on_the_numbers(capsys):
    check("thm-a", 1.0, 1.0 + 1e-12)
    check("thm-a", [3.0, 4.0], np.array([3.0, 4.0]))
    check("thm-b", np.eye(2), np.eye(2), rtol=1e-6, atol=1e-12)
    check("thm-c", np.bool_(True))
    assert capsys.readouterr().out.splitlines() == [
        "✓ thm-a  (rtol=1e-09)",
        "✓ thm-a  (rtol=1e-09)",
        "✓ thm-b  (rtol=1e-06, atol=1e-12)",
        "✓ thm-c",
    ]


@pytest.mark.parametrize("scale", [1e-200, 1e-60, 1e-30, 1.0, 1e24])
def test_is_relative_to_the_largest_entry_at_every_scale(scale):
    right = scale * np.array([[1.0, -4.0], [0.0, 2.0]])
    check("thm", right + scale * 3.9e-9, right)
    with pytest.raises(AssertionError, match="thm: largest deviation"):
        check("thm", right + scale * 4.1e-9, right)


@pytest.mark.parametrize("right", [0.0, np.zeros((2, 3))])
def test_only_an_explicit_atol_lets_a_small_number_pass_for_zero(right):
    left = np.full((2, 3), 1e-17)
    check("thm", np.zeros((2, 3)), right)
    check("thm", left, right, atol=1e-16)
    with pytest.raises(AssertionError, match="thm: largest deviation 1e-17"):
        check("thm", left, right)


def test_failure_names_the_label_and_the_largest_deviation_in_two_digits():
    with pytest.raises(AssertionError) as failure:
        check("thm-trace", [1.0, 2.0, 3.0], [1.0, 2.345678, 3.1])
    assert str(failure.value) == (
        "thm-trace: largest deviation 0.35, "
        "where rtol=1e-09 of the largest entry 3.1 and atol=0 are allowed"
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["left", "right"])
def test_numbers_that_are_not_finite_never_agree(bad, side):
    sides = {"left": np.array([1.0, 2.0]), "right": np.array([1.0, 2.0])}
    sides[side][1] = bad
    with pytest.raises(AssertionError, match=f"thm: {side} has 1 non-finite of 2 entries"):
        check("thm", **sides)
    with pytest.raises(AssertionError, match="non-finite"):
        check("thm", np.array([bad]), np.array([bad]))


def test_overflow_of_the_difference_is_a_failure():
    with pytest.raises(AssertionError, match="largest deviation inf"):
        check("thm", 1.7e308, -1.7e308)


def test_false_condition_fails():
    with pytest.raises(AssertionError, match="thm-order: the condition is False"):
        check("thm-order", 2 < 1)


def test_complex_and_integer_and_boolean_arrays_are_compared_as_they_are():
    check("thm", np.array([1 + 2j]), np.array([1 + 2j]))
    check("thm", np.array([1, 2]), np.array([1.0, 2.0]))
    with pytest.raises(AssertionError):
        check("thm", np.array([1 + 2j]), np.array([1 - 2j]))
    with pytest.raises(AssertionError):
        check("thm", np.array([True, False]), np.array([True, True]))


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (("", 1.0, 1.0), {}, "label must be a non-empty string, got ''"),
        ((1.0, 1.0), {}, "label must be a non-empty string, got 1.0"),
        (("thm", 1.0, 1.0), {"rtol": -1.0}, "rtol must be a finite number >= 0, got -1.0"),
        (("thm", 1.0, 1.0), {"atol": np.nan}, "atol must be a finite number >= 0, got nan"),
        (("thm", 1.0, 1.0), {"rtol": np.inf}, "rtol must be a finite number >= 0, got inf"),
        (("thm", np.ones(3), np.ones((3, 1))), {}, r"got \(3,\) and \(3, 1\) in 'thm'"),
        (("thm", 1.0, np.ones(3)), {}, r"got \(\) and \(3,\)"),
        (("thm", np.ones((0, 2)), np.ones((0, 2))), {}, r"left is empty \(shape \(0, 2\)\)"),
        (("thm", [np.ones(2), np.ones(3)], 1.0), {}, "left must be a number or one array"),
        (("thm", "one", 1.0), {}, "left must be numeric"),
        (("thm", 1.0, [None]), {}, "right must be numeric"),
        (("thm", np.array([True, True])), {}, "must be a single bool, got ndarray in 'thm'"),
        (("thm", 1.0), {}, "must be a single bool, got float"),
    ],
)
def test_what_cannot_be_compared_is_refused(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        check(*args, **kwargs)
