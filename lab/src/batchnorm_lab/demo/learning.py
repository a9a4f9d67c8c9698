"""Learning curves: test accuracy over the steps of plain gradient descent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm_lab.data import ImageData

BATCH = 60
TARGET = 0.95


@dataclass
class Curve:
    """What one training run gave.

    ``factor`` multiplies the base learning rate; ``accuracies`` are on the test images, in inference mode,
    after ``steps`` steps.
    """

    name: str
    factor: int
    learning_rate: float
    steps: list[int] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)

    @property
    def steps_to_target(self) -> int | None:
        """The first measured step with the target accuracy; None where it was never reached."""
        reached = (s for s, a in zip(self.steps, self.accuracies, strict=True) if a >= TARGET)
        return next(reached, None)

    @property
    def final(self) -> float:
        """Accuracy after the last step."""
        return self.accuracies[-1]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Give the share of images that a network in inference mode names right.

    Parameters
    ----------
    model : nn.Module
        Its mode is left as it was.
    images : Tensor, shape (N, C, H, W)
        Answered in one call.
    labels : Tensor, shape (N,)
        What is right.

    Returns
    -------
    float
        Between 0 and 1.
    """
    mode = model.training
    model.eval()
    try:
        return (model(images).argmax(1) == labels).float().mean().item()
    finally:
        model.train(mode)


def learn(
    model: nn.Module,
    data: ImageData,
    curve: Curve,
    *,
    steps: int,
    seed: int,
    advance: Callable[[int], None] = lambda step: None,
) -> Curve:
    """Train a network by gradient descent without momentum, and watch its test accuracy.

    Parameters
    ----------
    model : nn.Module
        Trained in place; left in inference mode.
    data : ImageData
        To learn from and to test on.
    curve : Curve
        Gives the learning rate; what is measured is added to it.
    steps : int
        Mini-batches of 60 samples.
    seed : int
        Of the order of the samples: the same for every network that is compared.
    advance : callable, optional
        Called after each step with its number.

    Returns
    -------
    Curve
        The given one, filled: every step up to 40, then every fifth.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=curve.learning_rate)
    order = torch.empty(0, dtype=torch.long)
    for step in range(1, steps + 1):
        if len(order) < BATCH:
            order = torch.randperm(len(data.train_labels), generator=generator)
        batch, order = order[:BATCH], order[BATCH:]
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(data.train_images[batch]), data.train_labels[batch]).backward()
        optimizer.step()
        if step <= 40 or step % 5 == 0:
            curve.steps.append(step)
            curve.accuracies.append(accuracy(model, data.test_images, data.test_labels))
        advance(step)
    model.eval()
    return curve
