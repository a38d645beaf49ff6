"""A batch that is split to fit into memory: several backward passes, one step."""

from torch.nn import functional


def one_part(model, optimizer, x, y, share=1.0):
    """Forward, statistics if they are asked for, backward; the loss counts by its share."""
    outputs = model(x)
    if optimizer.settings.fisher != "empirical":
        optimizer.accumulate_fisher(outputs)
    (share * functional.cross_entropy(outputs, y)).backward()


def step_in_parts(model, optimizer, batch, parts):
    """zero_grad, one backward pass for each of the parts (lists of examples), step."""
    optimizer.zero_grad()
    for part in parts:
        one_part(model, optimizer, *[t[list(part)] for t in batch], share=1 / len(parts))
    optimizer.step()
