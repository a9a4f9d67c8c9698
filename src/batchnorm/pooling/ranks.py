"""What ranks exchange between the two halves of a step: `batchnorm.steps.Between` over a process group."""

from __future__ import annotations

import time
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from batchnorm.distributed import conversation as talks
from batchnorm.distributed.calls import Call
from batchnorm.distributed.groups import Names, members
from batchnorm.errors import ArgumentError, NonFiniteError, PoolingError, TooFewValuesError
from batchnorm.kernels.contract import Statistics
from batchnorm.transforms import bare, outside, transforming

pools = members
"""The groups in which there is somebody to pool with; empty: nothing stands between."""


class Settings(NamedTuple):
    """What must be the same on every rank for their statistics to stay the same.

    Parameters
    ----------
    eps : float
        Of the layer.
    momentum : float or None
        Weight of the new batch.
    correction : int
        What the divisor of ``running_var`` is less than m.
    tracks : bool
        Whether running statistics are kept.
    network : int
        Which of the networks whose layers have these names.
    """

    eps: float
    momentum: float | None
    correction: int = 1
    tracks: bool = True
    network: int = 1

    def __str__(self) -> str:
        # as numbers of one type: a graph's are floats, whatever the user gave
        momentum = None if self.momentum is None else float(self.momentum)
        text = f"eps {float(self.eps)}, momentum {momentum}"
        if self.correction != 1:
            text += f", running_var_correction {self.correction}"
        if not self.tracks:
            text += ", no running statistics"
        return text if self.network == 1 else f"{text}, network {self.network} of this kind"


# no name has a control character in it
_BETWEEN = "\x1f"

_Made = TypeVar("_Made", bound="RankPooling")


class RankPooling:
    """One use of a layer whose statistics are those of all ranks of a group.

    All of `batchnorm.steps.Between` but the operator, which `batchnorm.pooling.graph` makes of it. Holds names
    and no tensors: it is kept until the backward, and made anew inside a compiled graph's operator.

    Parameters
    ----------
    groups : tuple of str
        As `batchnorm.distributed.groups.names_of` gave them: one group, or several, one level after the other.
    path : str
        The layer's path in the model.
    channels : int
        C.
    dtype : str
        Of the layer's input.
    domain : str
        The domain in force; empty outside every one.
    on_single_value, on_nonfinite : str
        The layer's policies, which all ranks apply to the pooled values.
    masked : bool
        Whether this rank has a mask.
    settings : Settings
        What else decides how the layer normalizes and what it keeps; the same on every rank.
    """

    def __init__(
        self,
        groups: Names,
        path: str,
        channels: int,
        dtype: str,
        domain: str,
        on_single_value: str,
        on_nonfinite: str,
        masked: bool,
        settings: Settings,
    ) -> None:
        self.groups, self.path, self.channels, self.dtype, self.domain = groups, path, channels, dtype, domain
        self.on_single_value, self.on_nonfinite, self.masked = on_single_value, on_nonfinite, masked
        self.settings = settings

    def statistics(self, local: Statistics) -> Statistics:
        """Merge every rank's statistics; the same bits on every rank.

        Parameters
        ----------
        local : Statistics
            Of this rank, float64; 0 where it has no values.

        Returns
        -------
        Statistics
            Of all ranks.

        Raises
        ------
        PoolingError
            The ranks are in different calls, or one does not answer.
        TooFewValuesError
            Fewer than two values in all and ``on_single_value="error"``; on every rank.
        NonFiniteError
            NaN or inf on any rank and ``on_nonfinite="raise"``; on every rank.
        """
        count, mean, m2 = local.count.double(), local.mean.double(), local.m2.double()
        masked = torch.full((), float(self.masked), dtype=torch.float64, device=mean.device)
        culprits: list[int] = []

        def pool(talk: talks.Conversation) -> None:
            nonlocal count, mean, m2, masked
            count, mean, m2, masked, nonfinite = talk.statistics(
                self.call("forward"), count, mean, m2, masked
            )
            if self.on_nonfinite == "raise" and nonfinite is not None and not culprits:
                culprits.extend(talk.rank(r) for r in torch.nonzero(nonfinite).flatten().tolist())

        last = self._at_every_level(pool)
        if culprits:
            raise self._nonfinite(culprits)
        if self.on_single_value == "error" and last is not None:
            # no value at all passes where no mask took any away: there is nothing to normalize
            enough = (count > 1) | ((count == 0) & (masked == 0))
            last.later(enough, lambda: self._too_few(int(count)))
        return Statistics(count, mean, m2)

    def sums(self, local: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Add up every rank's sums of the backward; the same bits on every rank.

        Parameters
        ----------
        local : tuple of Tensor, shape (C,)
            sum_dy and sum_dy_zhat of this rank.

        Returns
        -------
        tuple of Tensor, shape (C,)
            Of all ranks, float64.
        """
        total = self._sum(torch.cat((local[0].double(), local[1].double())), "backward")
        first, second = total.split(len(local[0]))
        return first, second

    def differentiable(self, local: Statistics) -> Statistics:
        """As :meth:`statistics`, in operations that torch differentiates, with twice the messages.

        Parameters
        ----------
        local : Statistics
            Of this rank.

        Returns
        -------
        Statistics
            Of all ranks.
        """
        count, mean, m2 = local
        if mean.is_meta or _is_fake(mean):
            return local  # there are no values to tell anybody
        counted = torch.as_tensor(count).to(mean.dtype).expand(mean.shape)
        present = torch.where(counted > 0, mean, 0)
        front = torch.stack(
            (counted.detach(), counted.detach() * present, torch.full_like(mean, float(self.masked)))
        )
        total, weighted, masked = _AllSum.apply(front.reshape(-1), self, "composite mean").view(3, -1)
        total = total.detach()
        pooled = weighted / total.clamp(min=1)
        own = torch.where(counted > 0, m2 + counted * (mean - pooled).square(), 0)
        spread = _AllSum.apply(own, self, "composite variance")
        if self.on_single_value == "error":
            enough = (total > 1) | ((total == 0) & (masked.detach() == 0))
            _require(enough, self, total)
        return Statistics(total[0], pooled, spread)

    def call(self, step: str) -> Call:
        """Give what this rank is in.

        Parameters
        ----------
        step : str
            Which message of the layer.

        Returns
        -------
        Call
            What all ranks must agree on.
        """
        policy = f"{self.on_single_value}, {self.on_nonfinite}"
        return Call(self.path, step, self.channels, self.dtype, self.domain, policy, str(self.settings))

    def dump(self) -> str:
        """Give this object as a text, for an operator's argument, but for eps and momentum.

        These may be symbols in a graph, which are no text; an operator takes them as numbers.

        Returns
        -------
        str
            What `load` reads.
        """
        words = (
            self.path,
            str(self.channels),
            self.dtype,
            self.domain,
            self.on_single_value,
            self.on_nonfinite,
            str(self.settings.correction),
            "tracks" if self.settings.tracks else "",
            str(self.settings.network),
        )
        # spelled out rather than dumped by a library: a compiler follows it
        return _BETWEEN.join((*words, "masked" if self.masked else "", *self.groups))

    @classmethod
    def load(cls: type[_Made], text: str, eps: float, momentum: float | None) -> _Made:
        """Make the object that `dump` wrote.

        Parameters
        ----------
        text : str
            What it wrote.
        eps, momentum : float
            What it left out.

        Returns
        -------
        RankPooling
            Equal to it; of the class that is asked.
        """
        path, channels, dtype, domain, single, nonfinite, *rest = text.split(_BETWEEN)
        correction, tracks, network, masked, *groups = rest
        settings = Settings(eps, momentum, int(correction), bool(tracks), int(network))
        return cls(
            tuple(groups), path, int(channels), dtype, domain, single, nonfinite, bool(masked), settings
        )

    def _sum(self, values: Tensor, step: str) -> Tensor:
        def pool(talk: talks.Conversation) -> None:
            nonlocal values
            values = talk.sums(self.call(step), values)

        self._at_every_level(pool)
        return values

    def _at_every_level(self, pool: Any) -> talks.Conversation | None:
        failed: PoolingError | None = None
        talk, begun = None, time.monotonic()
        for group in members(self.groups):
            talk = talks.conversation(group)
            if failed is not None:
                # the ranks of the next level wait for this one: it tells them
                talk.refuse(self.call("refused"), failed.what, begun)
                continue
            try:
                pool(talk)
            except PoolingError as error:
                failed = error
        if failed is not None:
            raise failed
        return talk

    def _too_few(self, total: int) -> TooFewValuesError:
        return TooFewValuesError(
            f"batch_norm: training needs at least 2 values per channel, and all ranks together have {total}.",
            why="a single value equals its own mean, so the output is the bias and no gradient reaches the input.",
            mend='a larger batch on any rank; or eval mode; or on_single_value="running".',
            at=self.path,
        )

    def _nonfinite(self, ranks: list[int]) -> NonFiniteError:
        names = ", ".join(f"rank {r}" for r in ranks)
        return NonFiniteError(
            f"batch_norm: the batch holds NaN or inf on {names}.",
            why="statistics taken from it would be NaN on every rank, and stay so.",
            mend='look upstream of this layer there; or on_nonfinite="skip" leaves the statistics as they were.',
            at=self.path,
        )


def _is_fake(tensor: Tensor) -> bool:
    return type(tensor).__name__ == "FakeTensor"


def _require(enough: Tensor, pooling: RankPooling, total: Tensor) -> None:
    if transforming(total):
        with outside():
            _require(bare(enough), pooling, bare(total))
    elif not bool(enough.all()):
        raise pooling._too_few(int(total.min()))


class _AllSum(torch.autograd.Function):
    """Every rank's values added up. Of the sum of all ranks' losses the gradient is again such a sum."""

    @staticmethod
    def forward(values: Tensor, pooling: RankPooling, step: str) -> Tensor:
        return pooling._sum(values.double(), step).to(values.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.pooling, ctx.step = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return _AllSum.apply(gradient, ctx.pooling, ctx.step + ", backward"), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        raise _unsupported("forward-mode derivatives")

    @staticmethod
    def vmap(info: Any, dims: Any, *inputs: Any) -> Any:
        raise _unsupported("torch.func.vmap")


def _unsupported(what: str) -> ArgumentError:
    return ArgumentError(
        f"batch_norm: {what} through a layer that pools over ranks.",
        why="each rank would send messages of its own, and nobody could say which of them belong together.",
        mend="desynchronize(model) for this computation; or take the derivative in reverse mode.",
    )
