"""One process, or one of those that torchrun started: who am I, and on which device."""

import os
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed


@dataclass(frozen=True)
class Here:
    """This process among `ranks`, and its device."""

    device: torch.device
    rank: int = 0
    ranks: int = 1

    @property
    def first(self):
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def agree(self, flag):
        """True on all processes if it is on any."""
        if self.ranks == 1:
            return flag
        votes = torch.tensor(float(flag), device=self.device)
        distributed.all_reduce(votes)
        return votes.item() > 0

    def mean(self, value):
        """Of a number, over the processes."""
        if self.ranks == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return total.item() / self.ranks

    def wait(self):
        """Until all processes are here; the device's queue is empty then, too."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.ranks > 1:
            distributed.barrier()


def is_first():
    """Whether this is the only process, or the first, also before they have joined."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def processes(device=None):
    """Join the group that torchrun's environment describes, for as long as the block lasts.

    Parameters
    ----------
    device : "cpu", "cuda", ...; None: a GPU if there is one. Under torchrun each process takes the
        GPU of its local rank.

    Raises
    ------
    ValueError
        If the device is not there.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for; torch sees no GPU here: use --device cpu")
    if ranks == 1 or distributed.is_initialized():
        initialized = distributed.is_initialized()
        yield Here(
            device,
            distributed.get_rank() if initialized else 0,
            distributed.get_world_size() if initialized else 1,
        )
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Here(device, distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
