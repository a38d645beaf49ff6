"""Image data sets of the Hugging Face hub as arrays: downloaded and cached, or from local Parquet.

The package `datasets` downloads, shows progress, caches and decodes; what is here says which
columns are meant, and turns what can go wrong into errors that say what to do.
"""

import glob
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Source:
    """Where a data set is on the hub, which of its columns are wanted, and what its images are.

    side : of the square images, in pixels.   mirror : whether an image in a mirror is one, too.
    """

    repository: str
    configuration: str
    image: str
    label: str
    channels: int
    side: int
    mirror: bool


HUB = {
    "mnist": Source("ylecun/mnist", "mnist", "image", "label", 1, 28, False),
    "fashion-mnist": Source(
        "zalando-datasets/fashion_mnist", "fashion_mnist", "image", "label", 1, 28, True
    ),
    "cifar10": Source("uoft-cs/cifar10", "plain_text", "img", "label", 3, 32, True),
    "cifar100": Source("uoft-cs/cifar100", "cifar100", "img", "fine_label", 3, 32, True),
    "svhn": Source("ufldl-stanford/svhn", "cropped_digits", "image", "label", 3, 32, False),
}
PARTS = ("train", "test")


def read_splits(name, folder=None):
    """Classes, and the training and test parts, of one of HUB.

    Parameters
    ----------
    name : a key of HUB.
    folder : path with train*.parquet and test*.parquet files, in it or in folders below it; None:
        download.

    Returns
    -------
    (classes, {"train": (x, y), "test": (x, y)}) : names of the classes; x (N, C, H, W) uint8,
        y (N,) int64.

    Raises
    ------
    ValueError
        If files are missing, damaged or of another schema, or the download fails.
    ImportError
        If `datasets` or Pillow is missing.
    """
    try:
        import datasets
        import PIL  # noqa: F401 (datasets decodes with it, and would say so late)
    except ImportError as error:
        raise ImportError(
            f"{name} is read with the packages datasets and Pillow; {error.name} is missing: "
            "pip install tekfac-edu[experiments]"
        ) from error
    source = HUB[name]
    where = f"the hub's {source.repository}" if folder is None else str(folder)
    read = _download(datasets, name) if folder is None else _read_folder(datasets, name, folder)
    columns = {part: _columns(read[part], source, f"{where} ({part})") for part in PARTS}
    classes = _classes(read["train"].features[source.label], columns["train"][1])
    for part, (x, y) in columns.items():
        if x.shape[1:] != columns["train"][0].shape[1:]:
            raise ValueError(
                f"{where}: training images are {columns['train'][0].shape[1:]}, those to test "
                f"{x.shape[1:]} (channels, height, width)"
            )
        if len(y) and not (y.min() >= 0 and y.max() < len(classes)):
            raise ValueError(
                f"{where} ({part}): labels must be 0 to {len(classes) - 1}; "
                f"found {y.min()} to {y.max()}"
            )
    return classes, columns


def _download(datasets, name):
    source = HUB[name]
    try:
        return {
            part: datasets.load_dataset(source.repository, source.configuration, split=part)
            for part in PARTS
        }
    except Exception as error:  # the network, the hub, the cache: each has its own class
        raise ValueError(
            f"{name} could not be had from the hub ({source.repository}), and is not in the cache: "
            f"{_first_line(error)}. Connect once, or give a folder of its Parquet files"
        ) from error


def _read_folder(datasets, name, folder):
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"{name}: there is no folder {folder}; give one with Parquet files, or none"
        )
    inside = folder / HUB[name].configuration  # a copy of the repository may have others beside it
    folder = inside if inside.is_dir() else folder
    read = {}
    for part in PARTS:
        files = sorted(map(str, folder.rglob(f"{part}*.parquet")))
        if not files:
            raise ValueError(
                f"{name}: no {part}*.parquet in {folder} or below it; the files of the hub's "
                f"{HUB[name].repository} are named {part}-00000-of-00001.parquet and so on"
            )
        for file in files:
            _check_parquet(name, file)
        try:
            # not load_dataset, which would ask the hub even for local files
            read[part] = datasets.Dataset.from_parquet([glob.escape(file) for file in files])
        except Exception as error:
            raise ValueError(
                f"{name}: {', '.join(files)} cannot be read: "
                f"{_first_line(error.__cause__ or error)}. "
                "Copy or download again what is damaged, and leave no other files there"
            ) from error
    return read


def _check_parquet(name, file):
    """A file whose end is missing has no footer: say so before anything is converted."""
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_metadata(file).num_rows
    except Exception as error:
        raise ValueError(
            f"{name}: {file} is damaged or truncated, or no Parquet file at all "
            f"({_first_line(error)}); copy or download it again"
        ) from error
    if rows == 0:
        raise ValueError(f"{name}: {file} holds no images; copy or download it again")


def _columns(part, source, where):
    """(x, y) of one part, decoded."""
    from datasets import Image

    missing = {source.image, source.label} - set(part.column_names)
    if missing:
        raise ValueError(
            f"{where}: no column {', '.join(sorted(missing))}; {source.repository} has "
            f"{source.image} and {source.label}, here are {', '.join(part.column_names)}"
        )
    try:
        part = part.select_columns([source.image, source.label])
        part = part.cast_column(source.image, Image(mode="L" if source.channels == 1 else "RGB"))
        pictures = [np.asarray(picture) for picture in part[source.image]]
        labels = list(part[source.label])
        for value in labels:
            if type(value) is not int:
                raise TypeError(f"one label is {value!r}")
    except Exception as error:
        raise ValueError(
            f"{where}: column {source.image} must hold encoded images, and {source.label} whole "
            f"numbers: {_first_line(error)}"
        ) from error
    sizes = {picture.shape for picture in pictures}
    if () in sizes:
        raise ValueError(f"{where}: column {source.image} has a row without an image; remove it")
    if len(sizes) > 1:
        raise ValueError(f"{where}: images must be of one size; found {sorted(sizes)[:4]}")
    x = np.stack(pictures)
    x = x[:, None] if source.channels == 1 else x.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(x), np.asarray(labels, dtype=np.int64)


def _classes(feature, labels):
    names = getattr(feature, "names", None)
    return tuple(names) if names else tuple(map(str, range(labels.max() + 1)))


def _first_line(error):
    """What an error says first; libraries add pages."""
    return (str(error) or type(error).__name__).strip().splitlines()[0][:200].rstrip(".")
