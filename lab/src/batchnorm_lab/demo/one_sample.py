"""One sample at a time: with the statistics of its mini-batch, and with those of the population (M10, M11)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchnorm.errors import TooFewValuesError
from batchnorm_lab.data import ImageData

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass
class OneSample:
    """Answers to test samples asked one at a time, and to mini-batches of growing size.

    ``probabilities_batch`` and ``probabilities_population`` are of one sample, ``accuracy_batch`` and
    ``accuracy_population`` of every test sample asked alone. ``by_size`` is the accuracy with mini-batch
    statistics by mini-batch size. ``refusal`` is what the layer says to one sample in training mode.
    """

    image: Tensor
    label: int
    probabilities_batch: Tensor
    probabilities_population: Tensor
    different_answers_batch: int
    accuracy_batch: float
    accuracy_population: float
    by_size: dict[int, float]
    refusal: str


@torch.no_grad()
def with_batch_statistics(model: nn.Module, images: Tensor, size: int) -> Tensor:
    """Answer in mini-batches, each normalized by its own mean and variance.

    A mini-batch of one is a sample and its copy: the mean and variance of one value twice are those of
    one value, and the layer, which refuses a single value, takes it.

    Parameters
    ----------
    model : nn.Module
        Copied, so that its statistics stay as they are.
    images : Tensor, shape (N, C, H, W)
        As many as fill whole mini-batches are answered.
    size : int
        Samples in a mini-batch.

    Returns
    -------
    Tensor, shape (N // size * size, classes)
        Logits.
    """
    asked = copy.deepcopy(model).train()
    answers = []
    for start in range(0, len(images) - size + 1, size):
        batch = images[start : start + size]
        answers.append(asked(torch.cat([batch, batch]))[:size] if size == 1 else asked(batch))
    return torch.cat(answers)


@torch.no_grad()
def ask_one_at_a_time(model: nn.Module, data: ImageData) -> OneSample:
    """Ask a trained network for every test sample alone, in both ways.

    Parameters
    ----------
    model : nn.Module
        With population statistics; in inference mode; not changed.
    data : ImageData
        Its test part is asked.

    Returns
    -------
    OneSample
        What came out. The sample that is shown is the first of the test set.
    """
    images, labels = data.test_images, data.test_labels

    def right(logits: Tensor) -> float:
        return (logits.argmax(1) == labels[: len(logits)]).float().mean().item()

    alone = with_batch_statistics(model, images, 1)
    population = torch.cat([model(image[None]) for image in images])
    by_size = {size: right(with_batch_statistics(model, images, size)) for size in BATCHES[1:]}
    refusal = ""
    try:
        copy.deepcopy(model).train()(images[:1])
    except TooFewValuesError as error:
        refusal = f"{type(error).__name__}: {error}"
    return OneSample(
        image=images[0, 0],
        label=int(labels[0]),
        probabilities_batch=alone[0].softmax(0),
        probabilities_population=population[0].softmax(0),
        different_answers_batch=len(alone.argmax(1).unique()),
        accuracy_batch=right(alone),
        accuracy_population=right(population),
        by_size={1: right(alone), **by_size},
        refusal=refusal,
    )
