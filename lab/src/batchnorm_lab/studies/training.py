"""Training of an ensemble: mini-batches from seeds, an optimizer with its own rate for each network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import DataError
from batchnorm_lab.data import ImageData
from batchnorm_lab.studies.ensemble import Ensemble

__all__ = ["EnsembleOptimizer", "accuracy", "batch_statistics", "mean_loss", "mini_batches", "train"]

# Activations of one layer that an evaluation may hold at once, in values (4 bytes each).
EVALUATION_VALUES = 2_000_000


class EnsembleOptimizer:
    """Stochastic gradient descent, with momentum, or Adam, with a learning rate for each network.

    The update rules are those of ``torch.optim.SGD`` (momentum 0.9) and ``torch.optim.Adam`` with
    their defaults; torch's own have one rate for all rows of a tensor.

    Parameters
    ----------
    networks : Ensemble
        Whose parameters are trained, all of them.
    rates : sequence of float
        Learning rate of each network.
    kind : {"sgd", "momentum", "adam"}, default "sgd"
        The rule.
    momentum : float, default 0.9
        Of "momentum".
    decay : float, default 0.0
        Weight decay: this many times the parameter is added to its gradient, gamma and beta included.

    References
    ----------
    D. Kingma and J. Ba, Adam: A Method for Stochastic Optimization, 2015, arXiv:1412.6980.
    """

    def __init__(
        self,
        networks: Ensemble,
        rates: Sequence[float],
        kind: str = "sgd",
        *,
        momentum: float = 0.9,
        decay: float = 0.0,
    ) -> None:
        if kind not in ("sgd", "momentum", "adam"):
            raise ValueError(f"kind={kind!r} is not sgd, momentum or adam")
        self.kind, self.momentum, self.decay = kind, momentum, decay
        self.parameters = networks.by_run()
        self.rates = torch.tensor(list(rates), dtype=torch.float32)[:, None]
        self.first = [torch.zeros(shape) for _, shape in self.parameters] if kind != "sgd" else []
        self.second = [torch.zeros(shape) for _, shape in self.parameters] if kind == "adam" else []
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        """Change every parameter by its gradient, and clear the gradients."""
        self.steps += 1
        for index, (parameter, shape) in enumerate(self.parameters):
            if parameter.grad is None:
                continue
            gradient = parameter.grad.view(shape)
            if self.decay:
                gradient = gradient.add(parameter.view(shape), alpha=self.decay)
            update = gradient
            if self.kind == "momentum":
                update = self.first[index].mul_(self.momentum).add_(gradient)
            elif self.kind == "adam":
                first = self.first[index].mul_(0.9).add_(gradient, alpha=0.1)
                second = self.second[index].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                root = (second / (1 - 0.999**self.steps)).sqrt_().add_(1e-8)
                update = first / (1 - 0.9**self.steps) / root
            parameter.view(shape).sub_(self.rates * update)
            parameter.grad = None


def mini_batches(samples: int, batch: int, seeds: Sequence[int]) -> Iterator[Tensor]:
    """Yield the indices of mini-batches for ever, shuffled anew in each epoch from each network's seed.

    The last mini-batch of an epoch is left out where it would be smaller.

    Parameters
    ----------
    samples : int
        How many there are.
    batch : int
        How many a mini-batch has.
    seeds : sequence of int
        One a network; the same seed sees the same order.

    Yields
    ------
    Tensor, shape (R, batch), int64
        Indices.

    Raises
    ------
    DataError
        There are fewer samples than a mini-batch needs.

    Examples
    --------
    >>> from batchnorm_lab.studies.training import mini_batches
    >>> next(mini_batches(10, 4, [0, 1])).shape
    torch.Size([2, 4])
    """
    if batch > samples:
        raise DataError(
            f"a mini-batch of {batch} was asked for and there are {samples} training images.",
            why="a mini-batch is drawn without repetition.",
            mend="more data, or a smaller mini-batch.",
        )
    generators = {seed: torch.Generator().manual_seed(7_919 * seed + 1) for seed in set(seeds)}
    while True:
        orders = {s: torch.randperm(samples, generator=g) for s, g in generators.items()}
        order = torch.stack([orders[seed] for seed in seeds])
        for start in range(0, samples - batch + 1, batch):
            yield order[:, start : start + batch]


def train(
    networks: Ensemble,
    optimizer: EnsembleOptimizer,
    data: ImageData,
    *,
    steps: int,
    batch: int,
    every: int = 0,
    observe: Callable[[int], None] | None = None,
    advance: Callable[[float], None] | None = None,
    over_ranks: bool = False,
) -> None:
    """Train an ensemble on the cross-entropy of its mini-batches.

    A network whose values overflow goes on as NaN and does not touch the others.

    Parameters
    ----------
    networks : Ensemble
        Put in training mode.
    optimizer : EnsembleOptimizer
        Of these networks.
    data : ImageData
        Its training part is used.
    steps, batch : int
        Mini-batches, and images in each.
    every : int, default 0
        ``observe(step)`` is called before the first step and after every this many; 0 is never.
    observe : callable or None
        What to look at; the networks are put in training mode again after it.
    advance : callable or None
        Called with the share that is done.
    over_ranks : bool, default False
        Each rank of a job of `torch.distributed` has an equal part of every mini-batch, and gradients are those
        of all; the networks of all ranks begin alike, and stay so.
    """
    source = mini_batches(len(data.train_labels), batch, networks.seeds)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if over_ranks else (0, 1)
    part = slice(rank * batch // ranks, (rank + 1) * batch // ranks)
    networks.train()
    for step in range(steps + 1):
        if observe is not None and every and step % every == 0:
            observe(step)
            networks.train()
        if step == steps:
            break
        index = next(source)[:, part]
        logits = networks(networks.images(data.train_images[index]))
        loss = F.cross_entropy(logits.flatten(0, 1), data.train_labels[index].flatten(), reduction="sum")
        (loss / batch).backward()
        if over_ranks:
            _add_over_ranks(networks)
        optimizer.step()
        if advance is not None and step % 10 == 0:
            advance(step / steps)


def _add_over_ranks(networks: Ensemble) -> None:
    """Give every rank the sum of all ranks' gradients, in one message."""
    gradients = [p.grad for p in networks.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


@contextmanager
def batch_statistics(networks: Ensemble) -> Iterator[None]:
    """Normalize by the mini-batch, as in training, while the moving averages stay where they are.

    Parameters
    ----------
    networks : Ensemble
        In training mode within the ``with`` statement, and afterwards in the mode they were in.

    Yields
    ------
    None
        Nothing.
    """
    norms = [module for module in networks.modules() if isinstance(module, _BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    training = networks.training
    networks.train()
    try:
        for norm in norms:
            norm.momentum = 0.0
            norm.num_batches_tracked = (
                None if norm.num_batches_tracked is None else torch.zeros_like(norm.num_batches_tracked)
            )
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked
        networks.train(training)


@torch.no_grad()
def accuracy(networks: Ensemble, images: Tensor, labels: Tensor, chunk: int | None = None) -> Tensor:
    """Return the share of images that each network names correctly.

    Outputs that are not finite count as wrong. The networks' mode is left as it is.

    Parameters
    ----------
    networks : Ensemble
        In the mode to evaluate.
    images : Tensor, shape (N, C, H, W)
        Pixels.
    labels : Tensor, shape (N,)
        Classes.
    chunk : int or None, default None
        Images in one forward pass: in training mode, the mini-batch whose statistics are used. A last
        chunk that is smaller is left out. None is as many as memory should hold, with none left out.

    Returns
    -------
    Tensor, shape (R,)
        Between 0 and 1.
    """
    step = chunk or max(1, EVALUATION_VALUES // (networks.runs * max(images[0].numel(), 100)))
    stop = len(images) - (len(images) % chunk if chunk else 0)
    right = torch.zeros(networks.runs)
    for start in range(0, stop, step):
        logits = networks(networks.images(images[start : min(start + step, stop)]))
        hits = logits.argmax(-1) == labels[start : min(start + step, stop)]
        right += (hits & logits.isfinite().all(-1)).sum(1)
    return right / stop


@torch.no_grad()
def mean_loss(networks: Ensemble, images: Tensor, labels: Tensor) -> Tensor:
    """Return each network's mean cross-entropy over some images, in nats; inf where it overflowed.

    Parameters
    ----------
    networks : Ensemble
        In the mode to evaluate.
    images : Tensor, shape (N, C, H, W)
        Pixels, in one forward pass.
    labels : Tensor, shape (N,)
        Classes.

    Returns
    -------
    Tensor, shape (R,)
        Nats.
    """
    logits = networks(networks.images(images))
    each = F.cross_entropy(logits.flatten(0, 1), labels.repeat(networks.runs), reduction="none")
    return each.view(networks.runs, -1).mean(1).nan_to_num(torch.inf, torch.inf)
