"""Tests that need what most machines lack are skipped with the reason; `pytest -rs` prints it."""

import os

import pytest


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
    if item.get_closest_marker("internet") and os.environ.get("TEKFAC_EDU_INTERNET") != "1":
        pytest.skip("downloads something: set TEKFAC_EDU_INTERNET=1 to allow it")


@pytest.fixture(scope="module")
def one_thread():
    """torch with one: for small matrices, and for bits, which may depend on the number."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
