"""The record of a run: what was measured, on what, with which versions, by which command.

`record.json` in the run's folder is written when the run ends, whole or not at all. A race of many
runs is one file with all their records, small enough to commit (`write_race`, `read_races`).
"""

import datetime
import json
import platform
import shlex
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import torch

import tekfac_edu
from tekfac_edu.experiments.configuration import Configuration
from tekfac_edu.experiments.files import whole_file
from tekfac_edu.experiments.migration import migrated_record

FORMAT = 2  # older ones are read through migration.py


def header(device):
    """What a number needs to be believed: device, versions, commit, command, date."""
    device = torch.device(device)
    if device.type == "cuda":
        named = torch.cuda.get_device_name(device)
    else:
        named = f"{_processor()}, {torch.get_num_threads()} thread(s)"
    return {
        "format": FORMAT,
        "device": named,
        "versions": {
            "tekfac_edu": tekfac_edu.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda if device.type == "cuda" else None,
            "python": platform.python_version(),
        },
        "commit": _commit(),
        "command": shlex.join([*_program(), *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def write_json(path, content):
    """Whole or not at all; OSError that names the file if it cannot be written."""
    try:
        with whole_file(Path(path)) as file:
            json.dump(content, file, ensure_ascii=False, allow_nan=False)
            file.write("\n")
    except OSError as error:
        raise OSError(
            f"{path} could not be written ({error}): make room, and give the same command again"
        ) from error


def read_record(path):
    """A run's record, checked; an older one in today's words.

    Raises
    ------
    ValueError
        If the file is no record of a format that is known.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        if record["format"] not in range(1, FORMAT + 1):
            raise ValueError(f"its format is {record['format']}; this version reads 1 to {FORMAT}")
        return _checked(record)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the record of a run: {error!r}") from error


def _checked(record):
    """With every setting that a run has now."""
    record = migrated_record(record)
    configuration = Configuration.from_dict(record["configuration"])
    settings = json.loads(json.dumps(configuration.as_dict()))  # lists, as in a file
    return record | {"format": FORMAT, "configuration": settings}


def write_race(path, runs, trials=()):
    """All records of a race, and the trials of its tuning, in one file."""
    write_json(path, {"format": FORMAT, "runs": list(runs), "trials": list(trials)})


def read_races(paths):
    """All records below these paths: files of races, files of runs, folders of either.

    Returns
    -------
    (runs, trials) : lists of records; trials are those with a held-out part.

    Raises
    ------
    ValueError
        If a path does not exist, or a file is no record.
    """
    runs = []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"there is no {path}")
        if path.is_dir():
            runs += [read_record(file) for file in sorted(path.rglob("record.json"))]
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        if "runs" in content:
            runs += map(_checked, content["runs"] + content["trials"])
        else:
            runs.append(read_record(path))
    trials = [run for run in runs if run["configuration"]["held_out"]]
    return [run for run in runs if not run["configuration"]["held_out"]], trials


def _processor():
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _program():
    """As a user would begin it: tekfac-edu, the module of a package, or a script."""
    path = Path(sys.argv[0])
    if path.stem in ("tekfac-edu", "command_line"):  # torchrun or python -m may have begun it
        return ["tekfac-edu"]
    if (path.parent / "__init__.py").exists():
        return ["python", "-m", f"{path.parent.name}.{path.stem}"]
    return [sys.argv[0]]


@lru_cache  # what is imported stays, whatever happens to the files
def _commit():
    """Of the source this package was imported from, "+" if it has changed; None outside git."""
    folder = Path(tekfac_edu.__file__).parent
    git = ["git", "-C", str(folder)]
    try:
        tracked = [*git, "ls-files", "--error-unmatch", "__init__.py"]
        subprocess.run(tracked, capture_output=True, check=True)
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "."], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")
