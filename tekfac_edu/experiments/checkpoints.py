"""Checkpoints that survive a kill at any moment: whole files only, the last two, checked when read.

The one before a checkpoint stays until it is whole (files.py), and is used if the last is damaged.
"""

import shutil
import warnings
import zipfile
from pathlib import Path

import torch

from tekfac_edu.experiments.files import whole_file

PATTERN = "checkpoint-*.pt"


def save_checkpoint(folder, step, state):
    """Write `state` as the checkpoint after so many steps; keep one older than it.

    Raises
    ------
    OSError
        If it cannot be written, which names the folder; earlier checkpoints are untouched.
    """
    folder = Path(folder)
    final = folder / f"checkpoint-{step:08d}.pt"
    try:
        with whole_file(final, "wb") as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch's zip writer has its own error for a full disk
        raise OSError(
            f"the checkpoint after step {step} could not be written to {folder} ({error}); "
            "earlier ones are untouched: make room, and give the same command to continue"
        ) from error
    kept = [path for path in checkpoints(folder) if path <= final][-2:]
    for path in folder.glob(PATTERN + "*"):  # older ones, damaged later ones, unfinished ones
        if path not in kept:
            path.unlink()


def load_checkpoint(folder, device="cpu"):
    """The newest checkpoint that is whole, or None if there is none at all.

    A damaged one is named in a warning, and the one before it is used.

    Raises
    ------
    ValueError
        If there are checkpoints and all are damaged.
    """
    found = checkpoints(folder)
    damage = []
    for path in reversed(found):
        try:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()  # compares every member with its checksum
            if broken is not None:
                raise zipfile.BadZipFile(f"the checksum of {broken} is wrong")
            state = torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # torch has many ways to say that a file is damaged
            damage.append(f"{path} ({str(error).splitlines()[0] if str(error) else error!r})")
            continue
        if damage:
            warnings.warn(f"damaged: {'; '.join(damage)}. Going on from {path.name}", stacklevel=2)
        return state
    if damage:
        raise ValueError(
            f"no checkpoint can be read: {'; '.join(damage)}. Delete the folder to start again"
        )
    return None


def checkpoints(folder):
    """Paths of the finished checkpoints, oldest first."""
    return sorted(Path(folder).glob(PATTERN))


def remove_checkpoints(folder):
    """A finished run needs none: its record stays."""
    for path in Path(folder).glob(PATTERN + "*"):
        path.unlink(missing_ok=True)


def check_room(folder, needed):
    """Make the folder; find out now, not after an epoch, whether `needed` bytes can be written.

    Raises
    ------
    OSError
        If the folder cannot be made or written to, or the disk is too full.
    """
    folder = Path(folder)
    probe = folder / "writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"yes")
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write to {folder} ({error}); give another folder") from error
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder} has {free / 2**20:.0f} MiB free; this run's checkpoints and record need "
            f"{needed / 2**20:.0f} MiB: make room, or give another folder"
        )


def expected_bytes(model, optimizer):
    """What one checkpoint takes at most: weights, momentum, and the layers' curvatures."""
    tensors = [*model.parameters(), *model.buffers()]
    total = 3 * sum(t.numel() * t.element_size() for t in tensors)
    for layer in getattr(optimizer, "layers", ()):
        block = 4 * (2 * layer.d_in**2 + 2 * layer.d_out**2 + 2 * layer.d_in * layer.d_out)
        total += block * (layer.blocks or 1)
    return total + 2**20
