"""Epochs of training batches, made where the images are: shuffled, cropped, flipped, normalized.

Everything random about an epoch is drawn at its beginning, on the CPU, from (seed, epoch): the same
on every device, and an epoch can be entered at any batch as if it had been run from its beginning.
"""

from dataclasses import dataclass

import torch

from tekfac_edu.arguments import whole_number
from tekfac_edu.data.images import Images

MARGIN = 4  # pixels of black around an image before it is cropped to its size again


@dataclass(frozen=True)
class Batches:
    """What one process trains with; iterate over `epoch(number)`.

    Attributes
    ----------
    images : Images, on the device.
    size : examples in a batch, over all processes; what is left of an epoch is dropped, and other
        examples are left out the next time.
    augment : crop at random to the same size from a margin of 4, flip at random.
    seed : of the order, the crops and the flips.
    rank, ranks : this process takes every ranks-th example of each batch, from rank on.
    unit : pixels from 0 to 1 rather than normalized, for auto-encoders.
    mirror : whether augmenting flips at all: a digit in a mirror is no digit.
    """

    images: Images
    size: int
    augment: bool = False
    seed: int = 0
    rank: int = 0
    ranks: int = 1
    unit: bool = False
    mirror: bool = True

    def __post_init__(self):
        whole_number("batch size", self.size, 1)
        whole_number("ranks", self.ranks, 1)
        if whole_number("rank", self.rank, 0) >= self.ranks:
            raise ValueError(f"rank must be below ranks, {self.ranks}; got {self.rank}")
        if self.size % self.ranks:
            raise ValueError(
                f"a batch of {self.size} cannot be shared equally by {self.ranks} processes"
            )
        if self.size > len(self.images.x_train):
            raise ValueError(
                f"a batch of {self.size} is more than the {len(self.images.x_train)} training "
                f"images of {self.images.name}"
            )

    def __len__(self):
        """Batches in an epoch."""
        return len(self.images.x_train) // self.size

    def epoch(self, number, start=0):
        """Yield (x, y) of the batches of epoch `number`, from batch `start` on.

        x : (size / ranks, C, H, W) float32.   y : (size / ranks,) int64.
        """
        whole_number("start", start, 0)
        # large odd factor: neighbouring seeds share no epochs
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        count, device = len(self.images.x_train), self.images.x_train.device
        order = torch.randperm(count, generator=draw).to(device)
        if self.augment:
            offsets = torch.randint(2 * MARGIN + 1, (2, count), generator=draw).to(device)
            flips = torch.randint(2, (count,), generator=draw).bool().to(device)
        for batch in range(start, len(self)):
            chosen = order[batch * self.size + self.rank : (batch + 1) * self.size : self.ranks]
            x = self.images.x_train[chosen]
            if self.augment:
                x = crop(x, *offsets[:, chosen])
                x = flip(x, flips[chosen]) if self.mirror else x
            x = self.images.unit(x) if self.unit else self.images.normalized(x)
            yield x, self.images.y_train[chosen]


def crop(x, top, left):
    """Cut each image out of a black margin of 4 pixels around it, at its own place.

    Parameters
    ----------
    x : (N, C, H, W) tensor.
    top, left : (N,) int64, 0 to 8; 4 is the image as it was.
    """
    N, C, H, W = x.shape
    padded = torch.nn.functional.pad(x, 4 * (MARGIN,))
    rows = top[:, None] + torch.arange(H, device=x.device)
    columns = left[:, None] + torch.arange(W, device=x.device)
    n = torch.arange(N, device=x.device)[:, None, None, None]
    c = torch.arange(C, device=x.device)[None, :, None, None]
    return padded[n, c, rows[:, None, :, None], columns[:, None, None, :]]


def flip(x, which):
    """Mirror left and right those images where `which`, (N,) bool, says so."""
    return torch.where(which[:, None, None, None], x.flip(-1), x)
