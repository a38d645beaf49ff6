"""What is minimized, and what is reported: classification, and reconstruction."""

from typing import ClassVar

import torch
from torch.nn import functional

EVALUATION_BATCH = 1000


class Classification:
    """Cross-entropy of the classes; the score is the accuracy, 0 to 1."""

    score: ClassVar = "accuracy"
    likelihood: ClassVar = "categorical"
    target: ClassVar = "label"
    unit: ClassVar = False  # pixels are normalized

    def loss(self, outputs, x, y):
        """Mean over examples."""
        return functional.cross_entropy(outputs, y)

    def score_sum(self, outputs, x, y):
        """Of the score, over examples."""
        return (outputs.argmax(1) == y).sum()


class Reconstruction:
    """Cross-entropy of the pixels, 0 to 1, summed over an image, as KFAC section 13 has it.

    The score is the reconstruction error ‖x − x̂‖², summed over an image.
    """

    score: ClassVar = "error"
    likelihood: ClassVar = "bernoulli"
    target: ClassVar = "image"
    unit: ClassVar = True  # pixels are probabilities

    def loss(self, outputs, x, y):
        """Mean over examples."""
        target = x.flatten(1)
        return functional.binary_cross_entropy_with_logits(outputs, target, reduction="sum") / len(
            x
        )

    def score_sum(self, outputs, x, y):
        """Of the score, over examples."""
        return (outputs.sigmoid() - x.flatten(1)).square().sum()


Task = Classification | Reconstruction


@torch.no_grad()
def evaluate(task, model, images):
    """Mean loss and score over the test images; the model is left in evaluation mode."""
    model.eval()
    total_loss = torch.zeros((), device=images.x_test.device)
    total_score = torch.zeros_like(total_loss)
    scale = images.unit if task.unit else images.normalized
    for x, y in zip(
        images.x_test.split(EVALUATION_BATCH), images.y_test.split(EVALUATION_BATCH), strict=True
    ):
        x = scale(x)
        outputs = model(x)
        total_loss += len(x) * task.loss(outputs, x, y)
        total_score += task.score_sum(outputs, x, y)
    count = len(images.x_test)
    return total_loss.item() / count, total_score.item() / count
