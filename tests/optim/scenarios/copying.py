"""The ways in which people duplicate a model with its optimizer."""

import copy
import pickle
from functools import partial

import pytest

from .resuming import through_a_file


def pickled(value):
    return pickle.loads(pickle.dumps(value))


every_way = pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, pickled, partial(through_a_file, weights_only=False)],
    ids=["deepcopy", "pickle", "file"],
)
