"""If this fails, losses and scores in records are of something else than the test images' means."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from tekfac_edu.data.images import Images
from tekfac_edu.experiments import tasks
from tekfac_edu.experiments.tasks import Classification, Reconstruction, evaluate

N, SIDE, CLASSES = 23, 4, 3


def pictures():
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(256, (N, 1, SIDE, SIDE), generator=draw, dtype=torch.uint8)
    y = torch.randint(CLASSES, (N,), generator=draw)
    return Images("noise", tuple("abc"), x[:9], y[:9], x, y)


def network(outputs):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(SIDE**2, 6), nn.BatchNorm1d(6), nn.Linear(6, outputs)
    )


def of_classes(z, y):
    """Cross-entropy and hits of one example, by loops."""
    total = sum(math.exp(value) for value in z)
    return math.log(total) - z[y], float(max(range(len(z)), key=lambda c: z[c]) == y)


def of_pixels(z, x):
    """Binary cross-entropy and squared error of one example, by loops."""
    loss = error = 0.0
    for logit, pixel in zip(z, x, strict=True):
        p = 1 / (1 + math.exp(-logit))
        loss -= pixel * math.log(p) + (1 - pixel) * math.log(1 - p)
        error += (pixel - p) ** 2
    return loss, error


def by_loops(task, z, x, y):
    z, x = z.double().numpy(), x.double().flatten(1).numpy()
    if isinstance(task, Classification):
        found = [of_classes(z[n], int(y[n])) for n in range(len(z))]
    else:
        found = [of_pixels(z[n], x[n]) for n in range(len(z))]
    return np.array(found)


@pytest.mark.parametrize("task", [Classification(), Reconstruction()], ids=lambda t: t.score)
def test_loss_and_score_are_those_of_loops(task):
    outputs = CLASSES if task.score == "accuracy" else SIDE**2
    images = pictures()
    z = 2 * torch.randn(N, outputs, generator=torch.Generator().manual_seed(2))
    x = images.unit(images.x_test)
    losses, scores = by_loops(task, z, x, images.y_test).T
    assert task.loss(z, x, images.y_test).item() == pytest.approx(losses.mean(), rel=1e-6)
    assert task.score_sum(z, x, images.y_test).item() == pytest.approx(scores.sum(), rel=1e-6)


@pytest.mark.parametrize("size", [7, 22, 23, 1000])
@pytest.mark.parametrize("task", [Classification(), Reconstruction()], ids=lambda t: t.score)
def test_evaluation_is_the_mean_over_test_images_whatever_the_batches(task, size, monkeypatch):
    """The last batch is smaller: means of means would be wrong."""
    monkeypatch.setattr(tasks, "EVALUATION_BATCH", size)
    images, pixels = pictures(), task.score == "error"
    model = network(SIDE**2 if pixels else CLASSES)
    x = images.unit(images.x_test) if pixels else images.normalized(images.x_test)
    with torch.no_grad():
        z = model.eval()(x)
    expected = by_loops(task, z, x, images.y_test).mean(0)
    assert evaluate(task, model.train(), images) == pytest.approx(expected, rel=1e-5)


def test_evaluation_changes_nothing_but_the_mode():
    model = network(CLASSES)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(Classification(), model.train(), pictures())
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
