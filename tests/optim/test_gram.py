"""If this fails, a large factor is not the second moment it should be."""

import pytest
import torch

from tekfac_edu.optim import factors

SHAPES = [(1, 40), (4, 40), (7, 40), (7, 13), (16, 100)]  # columns, rows


@pytest.mark.parametrize(("columns", "rows"), SHAPES)
@pytest.mark.parametrize("by_columns", [False, True])
def test_halves_make_the_whole(monkeypatch, columns, rows, by_columns):
    draw = torch.Generator().manual_seed(columns)
    a = torch.randn(rows, columns, generator=draw, dtype=torch.float64)
    whole = sum(torch.outer(row, row) for row in a)
    a = a.T.contiguous().T if by_columns else a
    monkeypatch.setattr(factors, "SPLIT", 2)
    torch.testing.assert_close(factors._gram(a), whole, rtol=1e-12, atol=1e-12)


def test_a_layer_wider_than_the_threshold():
    """The rule as it is used, on both sides of the seam between the halves."""
    width = factors.SPLIT + 88
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(1300, width, generator=draw, dtype=torch.float64)
    g = torch.randn(1300, 3, generator=draw, dtype=torch.float64)
    some = [0, 1, width // 2 - 1, width // 2, width // 2 + 1, width - 1]
    expected = sum(torch.outer(row, row) for row in a[:, some]) / len(a)
    A = factors.kfac_factors(a, g).A
    torch.testing.assert_close(A[some][:, some], expected, rtol=1e-11, atol=1e-12)
    assert A.shape == (width, width)
