"""Small batches on two ranks, with their statistics pooled and without: ``make demo-distributed``."""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import batchnorm
from batchnorm.distributed.groups import find
from batchnorm_lab.data import ImageData, load
from batchnorm_lab.demo.learning import accuracy

BATCH = 2
STEPS = 400
EVERY = 40
RATE = 0.03
ARMS = {False: "each rank by itself", True: "pooled over ranks"}


def network(seed: int, images: torch.Tensor) -> nn.Sequential:
    """Make the network of both arms.

    Parameters
    ----------
    seed : int
        Of its weights; the same on every rank.
    images : Tensor, shape (N, C, H, W)
        What it will see.

    Returns
    -------
    nn.Sequential
        Two hidden layers, each normalized by torch's own layer.
    """
    torch.manual_seed(seed)
    sizes = (images[0].numel(), 64, 64)
    hidden: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(sizes):
        hidden += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], 10))


def train(data: ImageData, pooled: bool, steps: int, seed: int) -> tuple[list[float], list[int]]:
    """Train one arm on this rank's share of the images.

    Parameters
    ----------
    data : ImageData
        The same on every rank.
    pooled : bool
        Whether statistics are those of all ranks.
    steps : int
        Updates, each on `BATCH` images a rank.
    seed : int
        Of weights and order.

    Returns
    -------
    accuracies : list of float
        On the test images in inference mode, every `EVERY` steps.
    messages : list of int
        Of the batch norms in each step.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = network(seed, data.train_images)
    if pooled:
        batchnorm.synchronize(model, "own")
    wrapped = DistributedDataParallel(model)
    layer: Any = model[2]
    group = find(layer.process_group[0]) if pooled else None
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    order = torch.Generator().manual_seed(seed)
    accuracies, messages = [], []
    for step in range(steps):
        chosen = torch.randint(len(data.train_labels), (ranks, BATCH), generator=order)[rank]
        before = group._get_sequence_number_for_group() if group is not None else 0
        loss = F.cross_entropy(wrapped(data.train_images[chosen]), data.train_labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        messages.append(group._get_sequence_number_for_group() - before if group is not None else 0)
        if (step + 1) % EVERY == 0:
            accuracies.append(accuracy(model, data.test_images, data.test_labels))
    return accuracies, messages


def draw(curves: dict[bool, list[float]], path: Path) -> None:
    """Draw test accuracy over steps.

    Parameters
    ----------
    curves : dict
        From pooled or not to accuracies.
    path : Path
        The figure.
    """
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for pooled, accuracies in curves.items():
        steps = [EVERY * (i + 1) for i in range(len(accuracies))]
        axes.plot(steps, accuracies, "-" if pooled else "--", label=ARMS[pooled])
    axes.set(xlabel="step", ylabel="test accuracy", title=f"digits, 2 ranks, {BATCH} images a rank")
    axes.legend()
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Run both arms and tell what came of them; started by torchrun."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=Path("results/demo-distributed.svg"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    begun = time.perf_counter()
    data = load("digits").standardized()
    curves: dict[bool, list[float]] = {}
    lines = []
    for pooled, name in ARMS.items():
        curves[pooled], messages = train(data, pooled, arguments.steps, arguments.seed)
        steady = sorted(set(messages[2:]))
        first = f" (first step {messages[0]}, second {messages[1]})" if pooled else ""
        told = f"messages a step {', '.join(map(str, steady))}{first}"
        lines.append(f"{name:<22}  test accuracy {curves[pooled][-1]:.3f}   {told}")
    if dist.get_rank() == 0:
        draw(curves, arguments.figure)
        ranks = dist.get_world_size()
        print(f"digits, {ranks} ranks, {BATCH} images a rank, {arguments.steps} steps, 2 batch norms")
        print("\n".join(lines))
        print(f"{time.perf_counter() - begun:.0f} s. Figure: {arguments.figure.resolve()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
