"""The four methods, for tests that hold of each."""

import pytest

from tekfac_edu.reference import EKFAC, KFAC, TEKFAC, TKFAC

METHODS = [KFAC, EKFAC, TKFAC, TEKFAC]
every_method = pytest.mark.parametrize("method", METHODS)
