"""Everything that the demonstration measures, in the order in which it is told."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from batchnorm.network.fold.fold import fold
from batchnorm.network.insert.insert import insert
from batchnorm.network.record import Record, record
from batchnorm.network.statistics.calibrate import calibrate
from batchnorm_lab.data import ImageData
from batchnorm_lab.demo.costs import Costs, count
from batchnorm_lab.demo.learning import BATCH, Curve, accuracy, learn
from batchnorm_lab.demo.network import plain_network
from batchnorm_lab.demo.one_sample import OneSample, ask_one_at_a_time

LEARNING_RATE = 0.05
FACTORS = (1, 5, 30)
STEPS = 500


class Advance(Protocol):
    """Called with what is being done, how much of it is done, and of how much."""

    def __call__(self, label: str, done: int, of: int) -> None: ...


@dataclass
class Insertion:
    """The network before and after insertion; ``jump`` is of a trained one, inserted with its data (M5)."""

    before: str
    after: str
    record: Record
    spreads: dict[str, dict[str, tuple[float, float]]]
    largest_answer: float = 0.0
    jump: float = 0.0


@dataclass
class Folded:
    """The folded network against the one it came from, over the whole test set."""

    before: Costs
    after: Costs
    logits: Tensor
    folded: Tensor
    record: Record

    @property
    def difference(self) -> float:
        """Largest difference of two logits."""
        return (self.logits - self.folded).abs().max().item()

    @property
    def same_answers(self) -> int:
        """Samples that both give the same class."""
        return int((self.logits.argmax(1) == self.folded.argmax(1)).sum())


@dataclass
class Story:
    """What one run of the demonstration measured."""

    seed: int
    steps: int
    insertion: Insertion
    calibrated_accuracy: float
    moving_accuracy: float
    one_sample: OneSample
    folded: Folded
    curves: list[Curve] = field(default_factory=list)


@torch.no_grad()
def spread(model: nn.Module, layers: dict[str, str], images: Tensor) -> dict[str, tuple[float, float]]:
    """Measure z, what goes into each nonlinearity, on one mini-batch.

    Parameters
    ----------
    model : nn.Module
        Copied and run in training mode.
    layers : dict
        Name to be shown, and path of the module whose output is z.
    images : Tensor, shape (N, C, H, W)
        The mini-batch.

    Returns
    -------
    dict
        By name: averages over channels of the absolute mean and of the standard deviation.
    """
    watched = copy.deepcopy(model).train()
    found: dict[str, tuple[float, float]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], z: Tensor) -> None:
            channels = z.transpose(0, 1).flatten(1)
            std = channels.std(1, correction=0)
            found[name] = (channels.mean(1).abs().mean().item(), std.mean().item())

        return hook

    for name, path in layers.items():
        watched.get_submodule(path).register_forward_hook(watch(name))
    watched(images)
    return found


def norm_paths(model: nn.Module, layers: list[str]) -> dict[str, str]:
    """Find the batch norm that follows each of some layers, by the order they stand in.

    Parameters
    ----------
    model : nn.Module
        With as many batch norms as ``layers``.
    layers : list of str
        Names of the normalized layers.

    Returns
    -------
    dict
        Layer to path of its batch norm.
    """
    channels = {name: next(model.get_submodule(name).parameters()).shape[0] for name in layers}
    norms = [
        (path, int(module.num_features))
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    paired = {}
    for name in layers:
        index = next(i for i, (_, features) in enumerate(norms) if features == channels[name])
        paired[name] = norms.pop(index)[0]
    return paired


def measure(data: ImageData, *, seed: int = 0, steps: int = STEPS, advance: Advance) -> Story:
    """Measure the whole demonstration.

    Parameters
    ----------
    data : ImageData
        Standardized digits.
    seed : int, optional
        Of weights and order.
    steps : int, optional
        Of each training run.
    advance : callable
        Told of every step.

    Returns
    -------
    Story
        All figures.
    """
    plain = plain_network(seed)
    example = data.train_images[:BATCH]
    normalized = insert(plain, example)
    hidden = [name for name, _ in plain.named_children()][:-1]
    insertion = Insertion(
        before=str(plain),
        after=str(normalized),
        record=record(normalized),
        spreads={
            "plain": spread(plain, {name: name for name in hidden}, example),
            "normalized": spread(normalized, norm_paths(normalized, hidden), example),
        },
    )

    curves, trained = [], {}
    for factor in FACTORS:
        for name, start in (("plain", plain), ("normalized", normalized)):
            model = copy.deepcopy(start)
            curve = Curve(name, factor, LEARNING_RATE * factor)
            report = partial(advance, f"{name}, learning rate {curve.learning_rate:g}", of=steps)
            learn(model, data, curve, steps=steps, seed=seed, advance=report)
            curves.append(curve)
            trained[name, factor] = model

    # M5: a network that is trained already is normalized without a jump
    already = trained["plain", 1]
    given = insert(already, example, data=[data.train_images], progress=False).eval()
    with torch.no_grad():
        answers = already.eval()(data.test_images)
        insertion.jump = (given(data.test_images) - answers).abs().max().item()
        insertion.largest_answer = answers.abs().max().item()

    model = trained["normalized", 5]
    moving = accuracy(model, data.test_images, data.test_labels)
    batches = list(data.train_images.split(BATCH))
    model = calibrate(model, batches, progress=False).eval()
    calibrated = accuracy(model, data.test_images, data.test_labels)
    advance("one sample at a time", 0, 1)
    one_sample = ask_one_at_a_time(model, data)
    advance("one sample at a time", 1, 1)
    advance("folding", 0, 1)
    folded = fold_and_compare(model, data)
    advance("folding", 1, 1)
    return Story(seed, steps, insertion, calibrated, moving, one_sample, folded, curves)


@torch.no_grad()
def fold_and_compare(model: nn.Module, data: ImageData) -> Folded:
    """Fold a trained network and hold it against what it came from.

    Parameters
    ----------
    model : nn.Module
        In inference mode; not changed.
    data : ImageData
        Its test part is answered by both.

    Returns
    -------
    Folded
        Answers and costs.
    """
    sample = data.test_images[:1]
    small = fold(model, data.train_images[:BATCH]).eval()
    return Folded(
        before=count(model, sample),
        after=count(small, sample),
        logits=model(data.test_images),
        folded=small(data.test_images),
        record=Record([row for row in record(small) if row.tool == "fold"]),
    )
