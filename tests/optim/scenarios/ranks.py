"""Two processes that train together, each on its half; what comes out is left in files."""

import os

import pytest
import torch
from torch import distributed, multiprocessing

needs_gloo = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="no gloo"
)


def on_two_ranks(play, folder):
    """What `play(rank)` returned on rank 0 and on rank 1; it is importable, tensors and numbers."""
    multiprocessing.spawn(_one_rank, (play, str(folder)), nprocs=2)
    return [torch.load(f"{folder}/rank{rank}.pt", weights_only=True) for rank in range(2)]


def _one_rank(rank, play, folder):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting_point", rank=rank, world_size=2
    )
    torch.save(play(rank), f"{folder}/rank{rank}.pt")
    distributed.destroy_process_group()
