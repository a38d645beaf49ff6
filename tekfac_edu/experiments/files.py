"""Files that are whole or not there: written under another name, flushed to the disk, renamed."""

import os
from contextlib import contextmanager

UNFINISHED = ".unfinished"


@contextmanager
def whole_file(path, mode="w"):
    """An open file that gets its name when the block ends; if it fails, `path` is as it was."""
    partial = path.with_name(path.name + UNFINISHED)
    try:
        with partial.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync(path.parent)
    except Exception:
        partial.unlink(missing_ok=True)
        raise


def _sync(folder):
    """Make the renaming itself last, where the system can open folders."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
