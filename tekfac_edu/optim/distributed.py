"""Many processes, each with its share of the batch: what they sum, and who decomposes what.

Statistics are sums over examples, so one `all_reduce` makes every rank know those of the whole
batch. An eigendecomposition is done by one rank and sent to the others. All ranks take the same
decisions, because they take them from what all of them have.
"""

import torch
from torch import distributed


def ranks_of(process_group):
    """The group to talk to, or None if there is nobody to talk to.

    process_group : "default" for all ranks once torch.distributed is initialised, None for never,
        or a torch.distributed group. ValueError for anything else.
    """
    if not (
        process_group in ("default", None)
        or (distributed.is_available() and isinstance(process_group, distributed.ProcessGroup))
    ):
        raise ValueError(
            f'process_group must be "default", None or a torch.distributed group; '
            f"got {process_group!r}"
        )
    if process_group is None or not (distributed.is_available() and distributed.is_initialized()):
        return None
    group = distributed.group.WORLD if process_group == "default" else process_group
    return group if distributed.get_world_size(group) > 1 else None


def sum_over_ranks(tensors, group):
    """The sums over ranks of tensors of one dtype and device, in one message."""
    if group is None or not tensors:
        return tensors
    flat = torch.cat([t.flatten() for t in tensors])
    distributed.all_reduce(flat, group=group)
    pieces = flat.split([t.numel() for t in tensors])
    return [piece.view_as(t) for piece, t in zip(pieces, tensors, strict=True)]


def rank_in(group):
    """This process's rank in the group; 0 without one."""
    return 0 if group is None else distributed.get_rank(group)


def ranks_in(group):
    """How many ranks the group has; 1 without one."""
    return 1 if group is None else distributed.get_world_size(group)


def received_from(owner, tensors, group):
    """The owner's tensors, None if it has none, on all ranks; others pass some of their shapes."""
    source = distributed.get_global_rank(group, owner)
    found = [tensors is not None]
    distributed.broadcast_object_list(found, source, group=group)
    if not found[0]:
        return None
    # eigh's Q lies in memory column by column, and what is sent is the memory.
    tensors = [tensor.contiguous() for tensor in tensors]
    for tensor in tensors:
        distributed.broadcast(tensor, source, group=group)
    return tensors
