"""If this fails, the chapters train on other digits than those their text and figures speak of."""

import hashlib
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from tekfac_edu.data import digits


@pytest.mark.parametrize(("pooled", "width"), [(False, 64), (True, 16)])
def test_shapes_types_and_units(pooled, width):
    data = digits(pooled)
    assert data.x_train.shape == (1437, width) and data.x_test.shape == (360, width)
    assert data.y_train.shape == (1437,) and data.y_test.shape == (360,)
    for x in (data.x_train, data.x_test):
        assert x.dtype == np.float64
        assert x.min() == 0.0 and 0.9 < x.max() <= 1.0
    for y in (data.y_train, data.y_test):
        assert y.dtype == np.int64
        assert sorted(set(y.tolist())) == list(range(10))


def test_split_is_a_partition_of_the_source_with_its_labels():
    data = digits()
    ours = [
        (*row, label)
        for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test))
        for row, label in zip((16 * x).tolist(), y.tolist(), strict=True)
    ]
    images, labels = load_digits(return_X_y=True)
    source = [(*row, label) for row, label in zip(images.tolist(), labels.tolist(), strict=True)]
    assert sorted(ours) == sorted(source)


def test_every_digit_has_its_share_in_the_test_part():
    data = digits()
    share = np.bincount(data.y_test) / (np.bincount(data.y_test) + np.bincount(data.y_train))
    assert np.abs(share - 360 / 1797).max() < 0.003  # half an image of about 180


def test_pooling_takes_the_mean_of_two_by_two_pixels():
    full, pooled = digits().x_train, digits(pooled=True).x_train
    for n in (0, 700):
        for row in range(4):
            for column in range(4):
                square = [
                    full[n, 8 * (2 * row + i) + 2 * column + j] for i in (0, 1) for j in (0, 1)
                ]
                assert pooled[n, 4 * row + column] == pytest.approx(sum(square) / 4, rel=1e-15)


def test_split_is_the_one_the_book_was_written_with():
    data = digits()
    assert data.y_train[:8].tolist() == [3, 9, 1, 3, 1, 9, 4, 4]
    ink = (16 * data.x_test).astype(np.uint8).tobytes() + data.y_test.astype(np.uint8).tobytes()
    assert hashlib.sha256(ink).hexdigest()[:16] == "33668cfbe0367fca"


def test_calls_share_no_memory():
    digits().x_train[:] = 7.0
    assert digits().x_train.max() == 1.0


def test_missing_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install tekfac-edu\[book\]"):
        digits()
