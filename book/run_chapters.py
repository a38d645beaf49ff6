"""Execute chapters, each in a fresh kernel, several at a time, and store them in one normal form.

    python book/run_chapters.py 06                  # book/06*.ipynb, in place
    python book/run_chapters.py --into DIRECTORY    # every chapter; book/ stays as it is
    python book/run_chapters.py 06 --no-execute     # only the normal form, outputs kept

The normal form makes diffs say what changed: cell ids follow from the cell's text, and times,
kernel versions and widget states are dropped.
"""

import argparse
import hashlib
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

BOOK = Path(__file__).parent
CELL_TIMEOUT = 60  # seconds; a whole chapter shall stay under it
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def chapters(prefix=""):
    """Paths of the chapters whose file name starts with `prefix`, in reading order."""
    return sorted(BOOK.glob(f"{prefix}*.ipynb"))


def execute(notebook, folder):
    """Run all cells of `notebook` in a fresh kernel in `folder`; outputs are stored in it."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    ).execute()


def normalize(notebook):
    """Keep of the metadata only what a reader's tools use; derive cell ids from the text."""
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    )
    seen = {}
    for cell in notebook.cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:8]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        cell.metadata = nbformat.from_dict(
            {key: cell.metadata[key] for key in ("mystnb", "tags") if cell.metadata.get(key)}
        )
    return notebook


def run(path, into, executing):
    """Execute and store one chapter; the message of its failure, or None."""
    notebook = nbformat.read(path, as_version=4)
    started, failure = time.perf_counter(), None
    if executing:
        try:
            execute(notebook, path.parent)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            failure = f"{path.name} stopped:\n{error}"
    # A chapter that stopped is stored as far as it came: its author looks for the error there.
    nbformat.write(normalize(notebook), into / path.name)
    print(f"{path.name}: {time.perf_counter() - started:.1f} s", flush=True)
    return failure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prefix", nargs="?", default="", help="start of the file name, like 06")
    parser.add_argument("--into", type=Path, default=BOOK, help="folder (default: in place)")
    parser.add_argument("--no-execute", action="store_true", help="only bring into normal form")
    arguments = parser.parse_args()
    paths = chapters(arguments.prefix)
    if not paths:
        parser.error(f"no chapter {BOOK / arguments.prefix}*.ipynb")
    arguments.into.mkdir(parents=True, exist_ok=True)
    # Sockets do not survive a fork, hence "spawn".
    with ProcessPoolExecutor(
        min(len(paths), os.cpu_count() or 1), multiprocessing.get_context("spawn")
    ) as pool:
        work = partial(run, into=arguments.into, executing=not arguments.no_execute)
        failures = [failure for failure in pool.map(work, paths) if failure]
    if failures:
        sys.exit("\n\n".join(failures))


if __name__ == "__main__":
    main()
