"""The book's data: scikit-learn's embedded 8×8 handwritten digits. Nothing is downloaded.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
Repository, 1998 (its test part, 1797 images, as scikit-learn ships it).
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Digits:
    """Handwritten digits, split once and for all.

    Attributes
    ----------
    x_train : (1437, 64) float64, or (1437, 16) when pooled. Rows are images read row by row.
        Ink from 0 (white) to 1 (black).
    y_train : (1437,) int64, the digit, 0 to 9.
    x_test : (360, 64) or (360, 16) float64, as x_train.
    y_test : (360,) int64.
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
    Digits

    Raises
    ------
    ImportError
        If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn, which is missing: pip install tekfac-edu[book]"
        ) from error
    images, labels = load_digits(return_X_y=True)
    x = images / 16.0
    if pooled:
        x = x.reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4)).reshape(-1, 16)
    x_train, x_test, y_train, y_test = train_test_split(
        x, labels, test_size=360, stratify=labels, random_state=0
    )
    return Digits(x_train, y_train.astype(np.int64), x_test, y_test.astype(np.int64))
