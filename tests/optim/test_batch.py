"""If this fails, a layer's batch does not fit into the memory it was to be worked on in."""

import pytest
import torch

from tekfac_edu.optim import batch as layer_batch

from .networks import CASES
from .one_step import OBJECTIVES, N, captured

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_fisher = pytest.mark.parametrize("fisher", OBJECTIVES)


@pytest.mark.parametrize("formed", [False, True])
@every_fisher
@every_case
def test_chunks_are_as_large_as_what_is_made_of_them_allows(case, fisher, formed, monkeypatch):
    """a and g; and with several positions each example's own gradient, if it is formed."""
    batch = captured(case, fisher)
    (whole,) = batch.chunks()
    a, g = whole.rows()
    each = [a.numel(), g.numel()]
    if formed and a.shape[-2] > 1:
        each.append(g.numel() // g.shape[-2] * a.shape[-1])
    for limit in (1, 40, 300, 2000):
        monkeypatch.setattr(layer_batch, "CHUNK", limit)
        chunks = list(batch.chunks(formed=formed))
        sizes = [len(chunk) for chunk in chunks]
        assert sum(sizes) == sum(chunk.weight for chunk in chunks) == N
        largest = max(1, limit // (max(each) // N))
        assert sizes[:-1] == [largest] * (len(sizes) - 1)
        assert sizes[-1] <= largest


@every_case
def test_a_batch_that_fits_is_one_chunk_whose_rows_are_made_once(case):
    batch = captured(case)
    drawn = {"examples": N, "rows": 1e9, "generator": torch.Generator()}  # which is all there are
    (chunk,), (again,), (all_of_it,) = (
        batch.chunks(),
        batch.chunks(formed=True),
        batch.chunks(**drawn),
    )
    assert chunk is again is all_of_it
    assert all(x is y for x, y in zip(chunk.rows(), chunk.rows(), strict=True))
