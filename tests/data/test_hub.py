"""If this fails, a network trains on other pixels or labels than its data set's files hold.

Or what is wrong with the files stays unsaid. Everything here but one test is offline.
"""

import io
import socket
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

pytest.importorskip("datasets", reason="needs tekfac-edu[experiments]")

import datasets
import pyarrow
import pyarrow.parquet
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow

from tekfac_edu.data.hub import read_splits
from tekfac_edu.data.images import load_images

TEN = tuple(f"class {number}" for number in range(10))


@dataclass(frozen=True)
class Schema:
    """A data set as the hub has it, written down from its data card: what the oracle goes by."""

    image: str
    label: str
    shape: tuple
    repository: str
    configuration: str
    other: str | None = None  # a column that is not wanted


SCHEMAS = {
    "mnist": Schema("image", "label", (28, 28), "ylecun/mnist", "mnist"),
    "fashion-mnist": Schema(
        "image", "label", (28, 28), "zalando-datasets/fashion_mnist", "fashion_mnist"
    ),
    "cifar10": Schema("img", "label", (32, 32, 3), "uoft-cs/cifar10", "plain_text"),
    "cifar100": Schema(
        "img", "fine_label", (32, 32, 3), "uoft-cs/cifar100", "cifar100", "coarse_label"
    ),
    "svhn": Schema("image", "label", (32, 32, 3), "ufldl-stanford/svhn", "cropped_digits"),
}
every_set = pytest.mark.parametrize("name", SCHEMAS)


@pytest.fixture(autouse=True)
def asked(monkeypatch, request):
    """Names of the machines that are asked for, none of which answers."""
    names = []

    def getaddrinfo(name, *_, **__):
        names.append(name)
        raise OSError(f"{name} was asked for in a test that is to be offline")

    if not request.node.get_closest_marker("internet"):
        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return names


@pytest.fixture(autouse=True)
def cache_of_its_own(monkeypatch, tmp_path):
    """What `datasets` keeps of a test's files goes where the test's files go."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def pictures(count, shape=(28, 28), seed=0):
    """Noise: no two pixels or channels can be exchanged unnoticed."""
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def hub_table(name, x, y, classes=TEN):
    """Images and labels as the hub stores them: PNG, and the names of the classes beside them."""
    schema = SCHEMAS[name]
    features = {schema.image: Image(), schema.label: ClassLabel(names=list(classes))}
    columns = {schema.image: [Pillow.fromarray(picture) for picture in x], schema.label: list(y)}
    if schema.other:
        features[schema.other] = ClassLabel(names=["coarse 0", "coarse 1"])
        columns[schema.other] = [1 - int(label) % 2 for label in y]
    return Dataset.from_dict(columns, features=Features(features))


def write(table, folder, part, shard=0, shards=1):
    """The file's path, named as the hub names it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{part}-{shard:05d}-of-{shards:05d}.parquet"
    table.to_parquet(path)
    return path


def write_both(name, folder, x, y, **other):
    """The same images to train and to test with; the path of the training file."""
    write(hub_table(name, x, y, **other), folder, "test")
    return write(hub_table(name, x, y, **other), folder, "train")


def png(picture):
    """The picture as a file's bytes, in the struct of the hub's image columns."""
    file = io.BytesIO()
    Pillow.fromarray(picture).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def write_plain(folder, images, labels, label_type=None):
    """Both parts without the hub's metadata: images (bytes, path), labels int64 or as given."""
    folder.mkdir(parents=True, exist_ok=True)
    image_type = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = {
        "image": pyarrow.array(images, image_type),
        "label": pyarrow.array(labels, label_type or pyarrow.int64()),
    }
    for part in ("train", "test"):
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"{part}.parquet")


def channels_first(x):
    """(N, H, W) or (N, H, W, C) -> (N, C, H, W), one number after the other."""
    x = x[..., None] if x.ndim == 3 else x
    out = np.zeros((x.shape[0], x.shape[3], *x.shape[1:3]), np.uint8)
    for channel in range(x.shape[3]):
        for n in range(len(x)):
            out[n, channel] = x[n, :, :, channel]
    return out


def assert_holds(found, x, y):
    """Pixels and labels, to the last bit, in order and of the promised types."""
    assert found[0].dtype == np.uint8 and found[1].dtype == np.int64
    np.testing.assert_array_equal(found[0], channels_first(x))
    np.testing.assert_array_equal(found[1], y)


@every_set
@pytest.mark.parametrize("below", ["", "plain_text", "some/where"])
def test_pixels_labels_and_names_arrive_exactly(name, below, tmp_path):
    shape = SCHEMAS[name].shape
    x_train, y_train = pictures(7, shape), [3, 0, 9, 9, 1, 2, 5]
    x_test, y_test = pictures(3, shape, seed=1), [8, 3, 0]
    write(hub_table(name, x_train, y_train), tmp_path / "set" / below, "train")
    write(hub_table(name, x_test, y_test), tmp_path / "set" / below, "test")
    classes, parts = read_splits(name, tmp_path / "set")
    assert classes == TEN
    assert_holds(parts["train"], x_train, y_train)
    assert_holds(parts["test"], x_test, y_test)


def test_shards_are_read_in_the_order_of_their_numbers(tmp_path):
    x, y = pictures(33), np.arange(33) % 10
    for shard in reversed(range(11)):  # written last is not read last
        part = slice(3 * shard, 3 * shard + 3)
        write(hub_table("mnist", x[part], y[part]), tmp_path / "set", "train", shard, 11)
    write(hub_table("mnist", x[:1], y[:1]), tmp_path / "set", "test")
    assert_holds(read_splits("mnist", tmp_path / "set")[1]["train"], x, y)


def test_images_come_as_tensors_that_may_be_written_to(tmp_path):
    x, y = pictures(4, (32, 32, 3)), [1, 2, 3, 4]
    write_both("cifar10", tmp_path / "set", x, y)
    images = load_images("cifar10", str(tmp_path / "set"))
    assert (images.name, images.classes, images.white) == ("cifar10", TEN, 255)
    for part in ("train", "test"):
        pixels, labels = getattr(images, f"x_{part}"), getattr(images, f"y_{part}")
        assert pixels.dtype == torch.uint8 and labels.dtype == torch.int64
        assert pixels.is_contiguous()
        assert_holds((pixels.numpy(), labels.numpy()), x, y)
    images.x_train[0] = 0
    assert load_images("cifar10", tmp_path / "set").x_train[0].max() > 0


def test_a_copy_of_the_whole_repository_is_read_at_its_configuration(tmp_path):
    """SVHN's repository has the uncropped pictures in the folder beside."""
    x, y = pictures(4, (32, 32, 3)), [1, 2, 3, 4]
    write_both("svhn", tmp_path / "set" / "cropped_digits", x, y)
    others = Dataset.from_dict({"image": [1, 2], "digits": [3, 4]})
    for part in ("train", "test"):
        write(others, tmp_path / "set" / "full_numbers", part)
    assert_holds(read_splits("svhn", tmp_path / "set")[1]["train"], x, y)


def test_reading_a_folder_asks_nobody(asked, tmp_path):
    """Where there is no network, each question would cost the seconds of its time limit."""
    write_both("mnist", tmp_path / "set", pictures(2), [1, 2])
    read_splits("mnist", tmp_path / "set")
    assert asked == []


@pytest.mark.parametrize("unusual", ["[1]", "a b", "x*y", "what?"])
def test_a_folder_may_have_an_unusual_name(unusual, tmp_path):
    x, y = pictures(2), [1, 2]
    write_both("mnist", tmp_path / unusual, x, y)
    assert_holds(read_splits("mnist", tmp_path / unusual)[1]["test"], x, y)


def test_the_home_folder_may_be_abbreviated(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_both("mnist", tmp_path / "set", pictures(2), [1, 2])
    assert read_splits("mnist", "~/set")[0] == TEN


def test_new_files_of_an_old_name_are_not_taken_from_the_cache(tmp_path):
    for seed in (0, 1):
        x, y = pictures(3 + seed, seed=seed), [seed] * (3 + seed)
        write_both("mnist", tmp_path / "set", x, y)
        assert_holds(read_splits("mnist", tmp_path / "set")[1]["train"], x, y)


def test_without_metadata_the_classes_are_the_numbers(tmp_path):
    x, y = pictures(4), [2, 0, 3, 1]
    write_plain(tmp_path / "set", [png(picture) for picture in x], y)
    classes, parts = read_splits("mnist", tmp_path / "set")
    assert classes == ("0", "1", "2", "3")
    assert_holds(parts["train"], x, y)


def test_grey_images_stored_as_colours_are_grey_again(tmp_path):
    x = pictures(3)
    write_both("mnist", tmp_path / "set", np.stack(3 * [x], axis=-1), [1, 2, 3])
    assert_holds(read_splits("mnist", tmp_path / "set")[1]["train"], x, [1, 2, 3])


def test_grey_images_among_coloured_ones_get_three_equal_channels(tmp_path):
    grey, coloured = pictures(2, (32, 32)), pictures(1, (32, 32, 3))
    write_both("cifar10", tmp_path / "set", [*grey, *coloured], [1, 2, 3])
    expected = np.concatenate([np.stack(3 * [grey], axis=-1), coloured])
    assert_holds(read_splits("cifar10", tmp_path / "set")[1]["train"], expected, [1, 2, 3])


# what can be wrong


def refusal(folder, name="mnist"):
    """What is said when the data set in a folder is refused."""
    with pytest.raises(ValueError) as caught:
        read_splits(name, folder)
    return str(caught.value)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    message = refusal(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in message and "give one with Parquet files" in message


@pytest.mark.parametrize("missing", ["train", "test"])
def test_a_part_without_files_is_named_with_how_files_are_called(missing, tmp_path):
    write_both("mnist", tmp_path / "set", pictures(2), [1, 2])
    (tmp_path / "set" / f"{missing}-00000-of-00001.parquet").unlink()
    message = refusal(tmp_path / "set")
    assert f"no {missing}*.parquet in {tmp_path / 'set'}" in message
    assert f"{missing}-00000-of-00001.parquet" in message and "ylecun/mnist" in message


@pytest.mark.parametrize("left", [0, 0.5, 0.999])
def test_a_truncated_file_is_named(left, tmp_path):
    path = write_both("mnist", tmp_path / "set", pictures(20), [1] * 20)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left * len(whole))])
    message = refusal(tmp_path / "set")
    assert f"{path} is damaged or truncated" in message and "download it again" in message


def test_a_file_damaged_inside_is_named_with_the_reason(tmp_path):
    path = write_both("mnist", tmp_path / "set", pictures(20), [1] * 20)
    inside = bytearray(path.read_bytes())
    inside[100:5000] = np.random.default_rng(0).bytes(4900)
    path.write_bytes(bytes(inside))
    message = refusal(tmp_path / "set")
    assert f"{path} cannot be read" in message and "download again" in message
    assert "error occurred while generating" not in message  # says nothing of the cause


def test_another_kind_of_file_is_named(tmp_path):
    path = write_both("mnist", tmp_path / "set", pictures(2), [1, 2])
    path.write_text("<html>404 Not Found</html>")
    assert f"{path} is damaged or truncated, or no Parquet file" in refusal(tmp_path / "set")


def test_a_file_without_images_is_named(tmp_path):
    write_plain(tmp_path / "set", [], [])
    assert f"{tmp_path / 'set' / 'train.parquet'} holds no images" in refusal(tmp_path / "set")


def test_shards_of_two_data_sets_are_named(tmp_path):
    write_both("mnist", tmp_path / "set", pictures(2), [1, 2])
    other = write(Dataset.from_dict({"text": ["a", "b"]}), tmp_path / "set", "train", 1, 2)
    message = refusal(tmp_path / "set")
    assert str(other) in message and "leave no other files there" in message


@pytest.mark.parametrize(
    ("written", "read", "missing"),
    [
        ("mnist", "cifar10", "no column img;"),
        ("cifar10", "mnist", "no column image;"),
        ("cifar10", "cifar100", "no column fine_label;"),
        ("mnist", "cifar100", "no column fine_label, img;"),
    ],
)
def test_files_of_another_data_set_are_told_by_their_columns(written, read, missing, tmp_path):
    write_both(written, tmp_path / "set", pictures(2, SCHEMAS[written].shape), [1, 2])
    message = refusal(tmp_path / "set", read)
    assert f"{tmp_path / 'set'} (train): {missing}" in message
    for column in (SCHEMAS[read].image, SCHEMAS[read].label, SCHEMAS[written].image):
        assert column in message


@pytest.mark.parametrize(
    ("labels", "kind", "shown"),
    [
        (["3", "4"], "string", "'3'"),
        (["cat", "dog"], "string", "'cat'"),
        ([1.0, 0.5], "float64", "1.0"),
        ([True, False], "bool", "True"),
    ],
)
def test_labels_that_are_not_whole_numbers_are_refused(labels, kind, shown, tmp_path):
    table = hub_table("mnist", pictures(2), [1, 2]).remove_columns("label")
    table = table.add_column("label", labels, feature=Value(kind))
    for part in ("train", "test"):
        write(table, tmp_path / "set", part)
    message = refusal(tmp_path / "set")
    assert "(train): column image must hold encoded images" in message
    assert f"label whole numbers: one label is {shown}" in message


def test_a_missing_label_is_refused(tmp_path):
    write_plain(tmp_path / "set", [png(picture) for picture in pictures(3)], [1, None, 2])
    assert "label whole numbers: one label is None" in refusal(tmp_path / "set")


def test_a_missing_image_is_refused(tmp_path):
    write_plain(tmp_path / "set", [png(pictures(1)[0]), None], [1, 2])
    assert "(train): column image has a row without an image" in refusal(tmp_path / "set")


@pytest.mark.parametrize("kind", ["int64", "string"])
def test_images_of_another_type_are_refused(kind, tmp_path):
    columns = {"image": [1, 2] if kind == "int64" else ["1", "2"], "label": [1, 2]}
    table = Dataset.from_dict(
        columns, features=Features({"image": Value(kind), "label": Value("int64")})
    )
    for part in ("train", "test"):
        write(table, tmp_path / "set", part)
    assert "(train): column image must hold encoded images" in refusal(tmp_path / "set")


@pytest.mark.parametrize("damage", [lambda b: b[:200], lambda b: b"no picture"])
def test_a_picture_that_cannot_be_decoded_is_refused(damage, tmp_path):
    good, bad = (png(picture) for picture in pictures(2))
    bad["bytes"] = damage(bad["bytes"])
    write_plain(tmp_path / "set", [good, bad], [1, 2])
    assert "(train): column image must hold encoded images" in refusal(tmp_path / "set")


def test_images_of_several_sizes_are_refused(tmp_path):
    write_both("mnist", tmp_path / "set", [pictures(1)[0], pictures(1, (28, 20))[0]], [1, 2])
    message = refusal(tmp_path / "set")
    assert "(train): images must be of one size" in message
    assert "(28, 20)" in message and "(28, 28)" in message


def test_parts_of_two_sizes_are_refused(tmp_path):
    write(hub_table("mnist", pictures(2), [1, 2]), tmp_path / "set", "train")
    write(hub_table("mnist", pictures(2, (32, 32)), [1, 2]), tmp_path / "set", "test")
    message = refusal(tmp_path / "set")
    assert "(1, 28, 28)" in message and "(1, 32, 32)" in message


@pytest.mark.parametrize(("part", "label"), [("train", -1), ("test", -1), ("test", 3)])
def test_labels_out_of_range_are_refused(part, label, tmp_path):
    """Without metadata: 0, 1 and 2 are the training labels."""
    labels = {"train": [0, 1, 2], "test": [0, 1, 2]}
    labels[part][1] = label
    for name, values in labels.items():
        write_plain(tmp_path / name, [png(picture) for picture in pictures(3)], values)
    folder = tmp_path / "set"
    folder.mkdir()
    for name in labels:
        (tmp_path / name / f"{name}.parquet").rename(folder / f"{name}.parquet")
    message = refusal(folder)
    assert f"{folder} ({part}): labels must be 0 to 2" in message
    assert f"{min(labels[part])} to {max(labels[part])}" in message


def test_labels_beyond_the_named_classes_are_refused(tmp_path):
    table = hub_table("mnist", pictures(2), [0, 1], classes=("a", "b"))
    write(table, tmp_path / "set", "test")
    path = write(table, tmp_path / "set", "train")
    stored = pyarrow.parquet.read_table(path)  # as another program could have written it
    position = stored.column_names.index("label")
    beyond = stored.set_column(position, stored.field("label"), [pyarrow.array([0, 2])])
    pyarrow.parquet.write_table(beyond, path)
    assert "(train): labels must be 0 to 1; found 0 to 2" in refusal(tmp_path / "set")


# the hub


@every_set
def test_the_hub_is_asked_for_the_right_data_set(name, monkeypatch):
    schema, asked = SCHEMAS[name], []
    held = {
        "train": (pictures(4, schema.shape), [1, 2, 3, 4]),
        "test": (pictures(2, schema.shape, seed=1), [5, 6]),
    }

    def load_dataset(repository, configuration, split):
        asked.append((repository, configuration, split))
        return hub_table(name, *held[split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    classes, parts = read_splits(name)
    assert sorted(asked) == [
        (schema.repository, schema.configuration, "test"),
        (schema.repository, schema.configuration, "train"),
    ]
    assert classes == TEN
    for part in held:
        assert_holds(parts[part], *held[part])


@every_set
def test_without_a_network_the_repository_is_named_and_what_to_do(name, monkeypatch):
    """As `datasets` itself says it, when HF_HUB_OFFLINE was set as it was imported."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError) as caught:
        read_splits(name)
    message = str(caught.value)
    assert message.startswith(f"{name} could not be had from the hub")
    assert SCHEMAS[name].repository in message and "Offline" in message
    assert "Connect once, or give a folder of its Parquet files" in message


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("Couldn't reach it.\nMore\nand more"), "the cache: Couldn't reach it. C"),
        (OSError(), "the cache: OSError. Connect"),
    ],
)
def test_what_a_download_fails_with_is_said_in_one_line(error, said, monkeypatch):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError) as caught:
        load_images("svhn")
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("package", ["datasets", "PIL"])
def test_a_missing_package_is_named_with_what_to_install(package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install tekfac-edu\[experiments\]") as caught:
        load_images("mnist", tmp_path)
    assert f"{package} is missing" in str(caught.value)


@pytest.mark.internet
def test_mnist_of_the_hub_is_mnist():
    """First labels and moments as everybody quotes them; this downloads 18 MB."""
    images = load_images("mnist")
    assert images.x_train.shape == (60000, 1, 28, 28) and images.x_test.shape == (10000, 1, 28, 28)
    assert images.y_train[:8].tolist() == [5, 0, 4, 1, 9, 2, 1, 3]
    assert images.classes == tuple("0123456789")
    mean, spread = images.statistics
    assert mean.item() == pytest.approx(0.1307, abs=5e-5)
    assert spread.item() == pytest.approx(0.3081, abs=5e-5)
