"""If this fails, a run does not see every image once an epoch, or cannot be resumed or shared."""

import pytest
import torch

from tekfac_edu.data.batches import Batches, crop, flip
from tekfac_edu.data.images import Images

CHANNELS, HEIGHT, WIDTH = 2, 5, 6


def noise(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (count, CHANNELS, HEIGHT, WIDTH)
    return torch.randint(1, 256, shape, generator=generator).byte()


def of(x):
    """Images whose labels number them."""
    classes = tuple(map(str, range(len(x))))
    return Images("numbered", classes, x, torch.arange(len(x)), x[:1], torch.arange(1))


def labels(batches, epoch=0, start=0):
    """The numbers of the images of an epoch, batch after batch."""
    return [y.tolist() for _, y in batches.epoch(epoch, start)]


def flat(lists):
    return [item for part in lists for item in part]


def same_bits(one, other):
    """Whether two lists of batches are the same, and not empty."""
    pairs = list(zip(one, other, strict=True))
    return bool(pairs) and all(torch.equal(a, b) for p, q in pairs for a, b in zip(p, q, strict=1))


# the order


@pytest.mark.parametrize("augment", [False, True])
def test_every_epoch_has_every_image_once(augment):
    batches = Batches(of(noise(24)), 6, augment)
    for epoch in range(3):
        assert len(labels(batches, epoch)) == len(batches) == 4
        assert sorted(flat(labels(batches, epoch))) == list(range(24))


def test_what_is_left_of_an_epoch_is_dropped_and_others_the_next_time():
    batches = Batches(of(noise(23)), 6)
    assert len(batches) == 3
    dropped = []
    for epoch in range(4):
        order = labels(batches, epoch)
        assert [len(part) for part in order] == [6, 6, 6]
        assert len(set(flat(order))) == 18
        dropped.append(frozenset(range(23)) - set(flat(order)))
    assert len(set(dropped)) == 4


def test_epochs_and_seeds_have_orders_of_their_own_and_the_same_seed_the_same():
    images = of(noise(24))
    orders = [flat(labels(Batches(images, 24, seed=s), e)) for s in range(5) for e in range(5)]
    assert len(set(map(tuple, orders))) == 25
    assert list(range(24)) not in orders
    again = [flat(labels(Batches(images, 24, seed=s), e)) for s in range(5) for e in range(5)]
    assert again == orders


def test_augmentation_does_not_change_the_order():
    images = of(noise(24))
    assert labels(Batches(images, 6), 2) == labels(Batches(images, 6, augment=True), 2)


def test_what_others_draw_does_not_matter():
    """The order belongs to the seed, not to who used torch's generator before."""
    images, runs = of(noise(24)), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        runs.append(list(Batches(images, 6, augment=True).epoch(1)))
        assert torch.equal(torch.get_rng_state(), state)
    assert same_bits(*runs)


def test_the_size_of_a_batch_changes_no_image():
    """Crops and flips belong to images, not to places in a batch."""
    images = of(noise(24))
    whole = [next(Batches(images, 24, augment=True).epoch(1))]
    parts = [torch.cat(part) for part in zip(*Batches(images, 6, augment=True).epoch(1))]  # noqa: B905
    assert same_bits(whole, [parts])


@pytest.mark.parametrize("augment", [False, True])
def test_an_epoch_can_be_entered_at_any_batch(augment):
    """Bit for bit: a resumed run is the run."""
    batches = Batches(of(noise(23)), 4, augment, seed=5)
    whole = list(batches.epoch(7))
    for start in range(5):
        assert same_bits(batches.epoch(7, start), whole[start:])
    assert list(batches.epoch(7, 5)) == []


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_ranks_together_have_the_batch_of_one_process(ranks, augment):
    images = of(noise(26))
    whole = list(Batches(images, 6, augment, seed=2).epoch(1))
    shares = [
        list(Batches(images, 6, augment, seed=2, rank=rank, ranks=ranks).epoch(1))
        for rank in range(ranks)
    ]
    assert len(whole) == 4 and all(len(share) == 4 for share in shares)
    for number, (x, y) in enumerate(whole):
        for place in range(6):
            part_x, part_y = shares[place % ranks][number]
            assert len(part_y) == 6 // ranks
            assert torch.equal(part_x[place // ranks], x[place])
            assert part_y[place // ranks] == y[place]


# the images


@pytest.mark.parametrize("unit", [False, True])
def test_without_augmentation_images_are_only_scaled(unit):
    images = of(noise(12))
    values = images.x_train.double() / 255
    if not unit:
        centre = values.mean((0, 2, 3), keepdim=True)
        values = (values - centre) / values.std((0, 2, 3), keepdim=True)
    for x, y in Batches(images, 4, unit=unit).epoch(0):
        assert x.dtype == torch.float32 and y.dtype == torch.int64
        torch.testing.assert_close(x.double(), values[y], rtol=1e-5, atol=1e-5)


def one_by_one(x, top, left):
    """A crop by loops: what was outside is 0."""
    out = torch.zeros_like(x)
    for n, picture in enumerate(x):
        for c in range(x.shape[1]):
            for i in range(x.shape[2]):
                for j in range(x.shape[3]):
                    row, column = i + int(top[n]) - 4, j + int(left[n]) - 4
                    if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
                        out[n, c, i, j] = picture[c, row, column]
    return out


def test_crop_is_that_of_a_loop_at_every_offset():
    x = noise(81)
    top, left = torch.arange(81) // 9, torch.arange(81) % 9
    cropped = crop(x, top, left)
    assert cropped.dtype == torch.uint8
    assert torch.equal(cropped, one_by_one(x, top, left))


def test_crop_in_the_middle_changes_nothing():
    x, middle = noise(5), torch.full((5,), 4)
    assert torch.equal(crop(x, middle, middle), x)


def test_flip_mirrors_those_it_is_told_to():
    x = noise(4)
    flipped = flip(x, torch.tensor([True, False, False, True]))
    for n, mirrored in enumerate((True, False, False, True)):
        for j in range(WIDTH):
            source = WIDTH - 1 - j if mirrored else j
            assert torch.equal(flipped[n, :, :, j], x[n, :, :, source])


def drawn(count, seed=0, epoch=0):
    """top, left and flipped of every image of an augmented epoch, read off the images.

    The pixels of an image are their own coordinates, from 1 on, and 12 is wide enough for the
    middle never to be margin.
    """
    side = 12
    rows = torch.arange(1, side + 1, dtype=torch.uint8)[:, None].expand(side, side)
    x = torch.stack([rows, rows.T]).expand(count, 2, side, side)
    pictures, numbers = next(Batches(of(x), count, True, seed, unit=True).epoch(epoch))
    pictures = (255 * pictures).round().long()
    top = pictures[:, 0, 6, 6] - 1 - 6 + 4
    flipped = pictures[:, 1, 6, 6] < pictures[:, 1, 6, 5]
    left = torch.where(flipped, pictures[:, 1, 6, 5], pictures[:, 1, 6, 6]) - 1 - 6 + 4
    expected = one_by_one(x[:200], top[:200], left[:200]).long()
    expected[flipped[:200]] = expected[flipped[:200]].flip(-1)
    assert torch.equal(pictures[:200], expected)  # whole images, margins too
    return torch.stack([top, left, flipped.long()])[:, numbers.argsort()]


def test_crops_and_flips_are_uniform_and_independent():
    """Shares within five standard deviations of a binomial count; correlations likewise."""
    count = 9000
    top, left, flipped = drawn(count)
    for offsets in (top, left):
        shares = offsets.bincount(minlength=9)
        assert len(shares) == 9 and (shares - count / 9).abs().max() < 5 * (count * 8 / 81) ** 0.5
    assert abs(flipped.sum() - count / 2) < 5 * (count / 4) ** 0.5
    correlation = torch.corrcoef(torch.stack([top, left, flipped]).double())
    assert (correlation - torch.eye(3)).abs().max() < 5 / count**0.5


def test_an_image_is_cropped_elsewhere_the_next_time():
    first = drawn(500)
    for other in (drawn(500, epoch=1), drawn(500, seed=1)):
        same = (first[:2] == other[:2]).all(0).double().mean()
        assert same < 0.06  # one in 81, and five standard deviations


def test_the_images_themselves_stay_as_they_are():
    images = of(noise(12))
    before = images.x_train.clone()
    for x, _ in Batches(images, 4, augment=True, unit=True).epoch(0):
        x.zero_()
    assert torch.equal(images.x_train, before)


# what can be wrong


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 25}, "a batch of 25 is more than the 24 training images of numbered"),
        ({"size": 0}, "batch size must be a whole number >= 1; got 0"),
        ({"size": 6.0}, "batch size must be a whole number"),
        ({"size": 6, "ranks": 4}, "a batch of 6 cannot be shared equally by 4 processes"),
        ({"size": 6, "ranks": 0}, "ranks must be a whole number >= 1; got 0"),
        ({"size": 6, "ranks": 2, "rank": 2}, "rank must be below ranks, 2; got 2"),
        ({"size": 6, "ranks": 2, "rank": -1}, "rank must be a whole number >= 0; got -1"),
    ],
)
def test_batches_that_cannot_be_made_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Batches(of(noise(24)), **settings)


def test_a_batch_may_be_all_there_is():
    assert len(Batches(of(noise(24)), 24)) == 1


def test_an_epoch_has_no_batch_before_the_first():
    with pytest.raises(ValueError, match="start must be a whole number >= 0; got -1"):
        next(Batches(of(noise(24)), 6).epoch(0, start=-1))


def test_digits_are_cropped_but_never_mirrored():
    """One image, not symmetric: every version is a crop of it, none of its mirror image."""
    images = of(noise(1).repeat(24, 1, 1, 1))
    seen = [
        next(Batches(images, 24, augment=True, mirror=mirror, unit=True).epoch(2))[0]
        for mirror in (True, False)
    ]
    assert not torch.equal(*seen)
    plain, offsets = seen[1], range(2 * 4 + 1)
    crops = [
        crop(images.unit(images.x_train[:1]), torch.tensor([top]), torch.tensor([left]))[0]
        for top in offsets
        for left in offsets
    ]
    assert all(any(torch.equal(picture, cut) for cut in crops) for picture in plain)
    assert not all(any(torch.equal(picture, cut) for cut in crops) for picture in seen[0])
