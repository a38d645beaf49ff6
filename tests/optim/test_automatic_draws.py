"""If this fails, whoever gives no interval gets other statistics than the documentation says."""

import pytest

from .networks import cnn, mlp
from .training import every_method

THIN, WHOLE = (2.0, 32), (None, None)


def draws(method, make, **options):
    optimizer = method(make(), 0.1, **options)
    return optimizer.factor_rows, optimizer.scale_examples


@every_method
def test_convolutions_without_an_interval_have_thin_statistics(method):
    assert draws(method, cnn) == THIN
    assert draws(method, cnn, warmup_steps=3, damping=0.1) == THIN


@every_method
def test_dense_networks_have_whole_ones(method):
    assert draws(method, mlp) == WHOLE


@pytest.mark.parametrize("name", ["factor_interval", "eigen_interval", "scale_interval"])
@every_method
def test_whoever_gives_an_interval_has_whole_ones(method, name):
    assert draws(method, cnn, **{name: 10}) == WHOLE


@every_method
def test_what_is_given_is_taken(method):
    assert draws(method, cnn, factor_rows=None) == (None, 32)
    assert draws(method, cnn, scale_examples=None) == (2.0, None)
    assert draws(method, cnn, scale_interval=1, factor_rows=5, scale_examples=7) == (5.0, 7)
    assert draws(method, mlp, factor_rows=5, scale_examples=7) == (5.0, 7)


@every_method
def test_another_word_is_refused(method):
    with pytest.raises(ValueError, match="factor_rows"):
        draws(method, cnn, factor_rows="all")
    with pytest.raises(ValueError, match="scale_examples"):
        draws(method, cnn, scale_examples="few")
