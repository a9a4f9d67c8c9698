"""One message a call, whose length every rank knows before it looks at what the others send.

A collective of different lengths aborts the process in some backends, so lengths never differ: every rank
sends a message of the length of the call that `Order` predicts, and says in its header which call it is
really in. Where all are in the predicted call, which is every call of a loop that repeats itself, the data
is in that message. Where all are in another one, a second message carries the data. Where they are in
different ones, every rank raises the same error.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor

from batchnorm.distributed.calls import PIECES, Call, code_of, pieces_of
from batchnorm.distributed.groups import global_rank, timeout_of
from batchnorm.distributed.merge import add_up, merge_statistics
from batchnorm.distributed.order import Order, Plan
from batchnorm.distributed.rollcall import RollCall, watch
from batchnorm.errors import BatchNormError, PoolingError

HEADER = 8
"""Words before the data: the call, the count, whether there was a mask; or pieces of the call's code."""

GATHER_LIMIT = 1 << 20
"""Bytes that a rank may receive in one gather; above, sums over ranks are sent instead of rows."""

# what a message takes that goes through
_MARGIN_S = 0.5

_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


# no message was predicted: one of no length
_NOTHING = Plan(0, 0)


class Pooled(NamedTuple):
    """Statistics over the ranks of a group.

    Parameters
    ----------
    count : Tensor, shape ()
        Values a channel; float64.
    mean, m2 : Tensor, shape (C,)
        Mean, and sum of squared deviations from it; float64.
    masked : Tensor, shape ()
        How many ranks had a mask.
    nonfinite : Tensor of bool, shape (P,), or None
        Whose statistics are not finite; None where that was not sent.
    """

    count: Tensor  # type: ignore[assignment]
    mean: Tensor
    m2: Tensor
    masked: Tensor
    nonfinite: Tensor | None


class _Late(NamedTuple):
    passed: Tensor
    event: Any
    error: Callable[[], BatchNormError]


class Conversation:
    """What the ranks of one group say to each other.

    Parameters
    ----------
    group : ProcessGroup
        Of more than one rank.
    """

    def __init__(self, group: Any) -> None:
        # weak: a group that was destroyed ends its conversation
        self._group, self._size = ref(group), group.size()
        self._order = Order()
        self._roll = RollCall(group)
        self._lost, self._refusing = "", False
        self._differed = 0
        self._late: deque[_Late] = deque()
        watch(self._roll)

    def statistics(self, call: Call, count: Tensor, mean: Tensor, m2: Tensor, masked: Tensor) -> Pooled:
        """Merge every rank's statistics.

        Parameters
        ----------
        call : Call
            What this rank is in.
        count : Tensor, shape ()
            Its values a channel.
        mean, m2 : Tensor, shape (C,)
            Its mean and sum of squared deviations, float64; 0 where it has no values.
        masked : Tensor, shape ()
            1 where a mask took part.

        Returns
        -------
        Pooled
            The same bits on every rank.
        """
        if not self._reduces(2 * len(mean)):
            rows = self._agree(call, (count, masked), torch.cat((mean, m2)), False)
            data = rows[:, HEADER:]
            means, m2s = data.split(len(mean), 1)
            merged = merge_statistics(rows[:, 1], means, m2s)
            return Pooled(*merged, rows[:, 2].sum(), ~torch.isfinite(data).all(1))
        sent = torch.cat((torch.stack((count, masked)), count * mean))
        total = self._agree(call, (), sent, True)[0, HEADER:]
        n, every_masked = total[0], total[1]
        pooled_mean = total[2:] / n.clamp(min=1)
        # about the pooled mean, so that no digits cancel
        own = m2 + count * (mean - pooled_mean).square()
        pooled_m2 = self._agree(call._replace(step=call.step + ", spread"), (), own, True)[0, HEADER:]
        return Pooled(n, pooled_mean, pooled_m2, every_masked, None)

    def sums(self, call: Call, values: Tensor) -> Tensor:
        """Add up every rank's values.

        Parameters
        ----------
        call : Call
            What this rank is in.
        values : Tensor, shape (K,)
            Its values, float64.

        Returns
        -------
        Tensor, shape (K,)
            The same bits on every rank.
        """
        reduces = self._reduces(len(values))
        rows = self._agree(call, (), values, reduces)[:, HEADER:]
        return rows[0] if reduces else add_up(rows)

    def rows(self, call: Call, values: Tensor) -> Tensor:
        """Give every rank's values.

        Parameters
        ----------
        call : Call
            What this rank is in.
        values : Tensor, shape (K,)
            Its values, float64.

        Returns
        -------
        Tensor, shape (P, K)
            In the order of ranks.
        """
        return self._agree(call, (), values, False)[:, HEADER:]

    def refuse(self, call: Call, why: str, since: float | None = None) -> None:
        """Tell the others that this rank cannot go on, in the message that they wait for.

        Parameters
        ----------
        call : Call
            Stands for the refusal; no rank is in it otherwise.
        why : str
            What the others are told.
        since : float or None
            When they may have begun to wait (`time.monotonic`). Where they have given up by now, as this rank
            has, nobody is told.
        """
        if since is not None and time.monotonic() - since > timeout_of(self._group()) - _MARGIN_S:
            return
        self._refusing = True
        try:
            self._agree(
                call._replace(path=f"{call.path}: {why}"), (), torch.zeros(0, dtype=torch.float64), False
            )
        except PoolingError:
            return  # the one that this rank is about to raise came first
        finally:
            self._refusing = False

    def later(self, passed: Tensor, error: Callable[[], BatchNormError]) -> None:
        """Raise an error unless a flag holds: at once on a CPU, else when the next message is sent.

        Parameters
        ----------
        passed : Tensor of bool, shape ()
            The same on every rank.
        error : callable
            Makes what is raised.
        """
        if deferred(passed):
            self._late.append(_Late(*_on_its_way(passed), error))
        elif not bool(passed):
            raise error()

    def rank(self, member: int) -> int:
        """Give the rank in the job of a member of the group.

        Parameters
        ----------
        member : int
            Its place in the group.

        Returns
        -------
        int
            Its place among all ranks.
        """
        return global_rank(self._group(), member)

    def _reduces(self, words: int) -> bool:
        return self._size * (words + HEADER) * 8 > GATHER_LIMIT

    def _agree(self, call: Call, flags: tuple[Tensor, ...], data: Tensor, reduces: bool) -> Tensor:
        """Send, and give what came, once all ranks are known to be in ``call``."""
        self._check_before(call)
        code = code_of(call)
        plan = Plan(code_of(call._replace(settings="")), len(data), reduces)
        expected = self._order.guess() or _NOTHING
        if expected == plan:
            came = self._send(call, self._header(code, flags, data, reduces), data, reduces)
        else:
            length = torch.zeros(expected.words, dtype=torch.float64, device=data.device)
            came = self._send(call, self._header(code, (), data, expected.reduces), length, expected.reduces)
        agreed = self._agreed(came, code, expected.reduces)
        if expected == plan and deferred(data):
            # read when the next call comes: to read it now would make the host wait for the device
            came = torch.where(agreed, came, float("nan"))
            came[:, 1] = torch.where(agreed, came[:, 1], 0)
            number = self._order.agreed
            self._late.append(_Late(*_on_its_way(agreed), lambda: self._disagreement(call, number)))
        elif not bool(agreed):
            raise self._disagreement(call, self._order.agreed)
        elif expected != plan:
            came = self._send(call, self._header(code, flags, data, reduces), data, reduces)
        self._order.learn(plan)
        return came

    def _header(self, code: int, flags: tuple[Tensor, ...], like: Tensor, reduces: bool) -> Tensor:
        if reduces:
            pieces = pieces_of(code)
            words = [float(p) for p in pieces] + [float(p * p) for p in pieces]
            return torch.tensor(words, dtype=torch.float64, device=like.device)
        header = torch.zeros(HEADER, dtype=torch.float64, device=like.device)
        header[0] = code
        for i, flag in enumerate(flags, 1):
            header[i] = flag
        return header

    def _agreed(self, came: Tensor, code: int, reduced: bool) -> Tensor:
        if not reduced:
            return (came[:, 0] == code).all()
        pieces = pieces_of(code)
        wanted = [self._size * p for p in pieces] + [self._size * p * p for p in pieces]
        # numbers whose mean is k and whose mean square is k * k are all k
        return (came[0, : 2 * PIECES] == torch.tensor(wanted, dtype=came.dtype, device=came.device)).all()

    def _send(self, call: Call, header: Tensor, data: Tensor, reduces: bool) -> Tensor:
        message = torch.cat((header, data))
        self._roll.waits(str(call))
        try:
            if reduces:
                dist.all_reduce(message, group=self._group())
                return message.unsqueeze(0)
            came = message.new_empty(self._size * len(message))
            _gather(came, message, group=self._group())  # type: ignore[misc]
            return came.view(self._size, -1)
        except RuntimeError as error:
            raise self._absence(call, error) from error
        finally:
            self._roll.waits(None)

    def _check_before(self, call: Call) -> None:
        if self._lost:
            raise PoolingError(
                f"batch_norm: {call} cannot be pooled, for an earlier message of this group was lost.",
                why=self._lost,
                mend="end the job on every rank; or destroy_process_group() and init_process_group() again.",
                at=call.path,
            )
        while self._late and (self._late[0].event is None or self._late[0].event.query()):
            late = self._late.popleft()
            if not bool(late.passed):
                self._late.clear()
                error = late.error()
                if isinstance(error, PoolingError):
                    self._lost = error.what
                raise error

    def _disagreement(self, call: Call, number: int) -> PoolingError:
        self._differed += 1
        heard = self._roll.call("differ", str(call), f"{number}/{self._differed}")
        said = "; ".join(f"rank {r} is in {place.where}" for r, place in sorted(heard.places.items()))
        if not heard.asked:
            said += "; the store did not tell where the others are"
        return PoolingError(
            f"batch_norm: the ranks are in different calls: {said}.",
            why="each would take the other's numbers for those of its own layer.",
            mend="let every rank call the same layers in the same order, mode, dtype and domain, and with the same "
            "options; no branch that depends on the rank or on its data.",
            at=call.path,
        )

    def _who_is_missing(self, call: Call) -> str:
        if self._refusing:
            return f"no refusal went through in {call}"  # another error is on its way up
        heard = self._roll.call("lost", str(call))
        said = [f"rank {r} waits in {place.where}" for r, place in sorted(heard.places.items())]
        said += [f"rank {r} had raised: {text}" for r, text in sorted(heard.raised.items())]
        names = ", ".join(f"rank {r}" for r in heard.missing)
        if not names:
            return f"no message went through in {call}; {'; '.join(said)}"
        if not heard.asked and len(heard.places) == 1:
            # torchrun keeps the store in a process of its own; without it rank 0 does
            return f"rank 0 does not answer, which keeps the store, and {call} cannot be pooled; {said[0]}"
        mine = {self.rank(r) for r in range(self._size)}
        where = ", and holds up those who wait" if mine.isdisjoint(heard.missing) else f" to {call}"
        what = f"{names} did not come{where}; {'; '.join(said)}"
        if heard.asked:
            self._roll.raises(what)
        return what

    def _absence(self, call: Call, cause: RuntimeError) -> PoolingError:
        what = self._who_is_missing(call)
        first = str(cause).strip().splitlines()
        self._lost = what
        return PoolingError(
            f"batch_norm: {what}.",
            why="statistics are pooled over every rank of the group, and a rank that is in eval mode, takes another "
            f"branch, ran out of batches or has died says nothing. The backend: {first[0] if first else cause!r}",
            mend="look at that rank's own error first. Loaders of different lengths: for batch in "
            "batchnorm.together(loader). The group is lost: end the job, or initialise it again.",
            at=call.path,
        )


def deferred(data: Tensor) -> bool:
    """Whether what came is looked at later, because the host would have to wait for a device."""
    return data.device.type != "cpu"


def _on_its_way(flag: Tensor) -> tuple[Tensor, Any]:
    if flag.device.type == "cpu":
        return flag, None
    host = torch.empty((), dtype=torch.bool, pin_memory=True)
    host.copy_(flag, non_blocking=True)
    event = torch.Event(flag.device.type)
    event.record()
    return host, event


_conversations: WeakKeyDictionary[Any, Conversation] = WeakKeyDictionary()


def conversation(group: Any) -> Conversation:
    """Give the conversation of a group; it begins when it is first asked for.

    Parameters
    ----------
    group : ProcessGroup
        Of more than one rank.

    Returns
    -------
    Conversation
        The same object for the same group.
    """
    found = _conversations.get(group)
    if found is None:
        found = _conversations[group] = Conversation(group)
    return found
