"""Messages between ranks: their length, their number, and who is named when they do not come."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import outcomes_of, run

from batchnorm.distributed import conversation as module
from batchnorm.distributed.calls import Call, code_of, pieces_of
from batchnorm.distributed.conversation import conversation
from batchnorm.distributed.merge import add_up, merge_statistics
from batchnorm.distributed.order import Order, Plan
from batchnorm.errors import BatchNormError


def call(path, channels=4, step="forward"):
    return Call(path, step, channels, "float32")


# -- prediction ------------------------------------------------------------------------------------------------
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_a_loop_that_repeats_itself_is_predicted_from_its_third_round(loop):
    order = Order()
    for turn in range(4):
        for code in loop:
            if turn >= 2:
                assert order.guess() == Plan(code, 2 * code)
            order.learn(Plan(code, 2 * code))


@given(st.lists(st.integers(0, 3), max_size=60))
def test_the_guess_depends_on_the_calls_alone(calls):
    first, second = Order(), Order()
    for code in calls:
        assert first.guess() == second.guess()
        first.learn(Plan(code, 1))
        second.learn(Plan(code, 1))


def test_the_past_is_bounded(monkeypatch):
    monkeypatch.setattr("batchnorm.distributed.order._KEPT", 8)
    order = Order()
    for i in range(100):
        order.learn(Plan(i % 3, 1))
    assert len(order._calls) <= 17
    assert order.guess() == Plan(100 % 3, 1)


def test_a_code_is_exact_in_float64_and_in_its_pieces():
    code = code_of(call("a"))
    assert code != code_of(call("b"))
    assert int(torch.tensor(code, dtype=torch.float64)) == code
    assert sum(p << (13 * i) for i, p in enumerate(pieces_of(code))) == code


# -- merging ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("counts", [[3], [2, 5], [0, 4], [1, 0, 7], [0, 0], [4, 1, 0, 2, 9]])
def test_merged_statistics_are_those_of_all_values(counts):
    parts = [torch.randn(n, 3, dtype=torch.float64) * 0.01 + 1e4 for n in counts]
    zero = torch.zeros(3, dtype=torch.float64)
    mean = torch.stack([p.mean(0) if len(p) else zero for p in parts])
    m2 = torch.stack([(p - p.mean(0)).square().sum(0) if len(p) else zero for p in parts])
    n, pooled, spread = merge_statistics(torch.tensor(counts, dtype=torch.float64), mean, m2)
    every = torch.cat(parts)
    assert n == sum(counts)
    if len(every):
        torch.testing.assert_close(pooled, every.mean(0), rtol=1e-14, atol=0)
        torch.testing.assert_close(spread, (every - every.mean(0)).square().sum(0), rtol=1e-8, atol=1e-12)


def test_rows_add_up():
    rows = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(add_up(rows), rows.sum(0))


# -- messages --------------------------------------------------------------------------------------------------
def talk(rank, limit):
    if limit is not None:
        module.GATHER_LIMIT = limit
    speak = conversation(dist.group.WORLD)
    number = dist.group.WORLD._get_sequence_number_for_group
    sent, answers = [], []
    for _ in range(4):
        before = number()
        for name, channels in (("a", 4), ("b", 7), ("b", 7)):
            g = torch.Generator().manual_seed(rank)
            z = torch.randn(rank, channels, generator=g, dtype=torch.float64) + 3
            mean = z.mean(0) if rank else torch.zeros(channels, dtype=torch.float64)
            count = torch.tensor(float(rank), dtype=torch.float64)
            m2 = (z - mean).square().sum(0)
            answers.append(speak.statistics(call(name, channels), count, mean, m2, torch.zeros(())))
            speak.sums(call(name, channels, "backward"), mean)
        sent.append(number() - before)
    return sent, [[t for t in a if t is not None] for a in answers]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("limit", [None, 0], ids=["gather", "reduce"])
def test_one_message_a_call_in_the_steady_state_and_the_same_bits(ranks, limit):
    results = run(talk, ranks, limit)
    per_step = 6 if limit is None else 9
    for sent, _ in results:
        assert sent[2:] == [per_step] * 2, sent
    for pooled in zip(*(answers for _, answers in results), strict=True):
        for values in zip(*pooled, strict=True):
            for value in values[1:]:
                assert torch.equal(value, values[0])
    z = torch.cat(
        [
            torch.randn(r, 4, generator=torch.Generator().manual_seed(r), dtype=torch.float64) + 3
            for r in range(ranks)
        ]
    )
    count, mean, m2 = results[0][1][0][:3]
    assert count == len(z)
    torch.testing.assert_close(mean, z.mean(0))
    torch.testing.assert_close(m2, (z - z.mean(0)).square().sum(0))


# -- disagreement ----------------------------------------------------------------------------------------------
def disagree(rank, odd, warm):
    speak = conversation(dist.group.WORLD)
    for _ in range(warm):
        speak.rows(call("layer1.bn", 4), torch.zeros(4, dtype=torch.float64))
    mine = odd if rank == 1 else call("layer1.bn", 4)
    before = time.monotonic()
    try:
        speak.rows(mine, torch.zeros(mine.channels, dtype=torch.float64))
    except BatchNormError as error:
        spent = time.monotonic() - before
        # the group is whole: the next call goes through
        after = speak.rows(call("after"), torch.ones(4, dtype=torch.float64))
        return str(error), spent, float(after.sum())
    return None


@pytest.mark.parametrize("warm", [0, 1, 3])
@pytest.mark.parametrize(
    "odd",
    [
        Call("head.bn", "forward", 9, "float32"),
        Call("head.bn", "forward", 4, "float32"),
        Call("layer1.bn", "forward", 4, "float64"),
        Call("layer1.bn", "forward", 4, "float32", "fake"),
        Call("layer1.bn", "backward", 4, "float32"),
    ],
    ids=["channels", "layer", "dtype", "domain", "step"],
)
def test_ranks_in_different_calls_all_raise_at_once_and_name_them(odd, warm):
    for text, spent, after in run(disagree, 3, odd, warm):
        assert f"rank 1 is in {odd}" in text
        assert f"rank 2 is in {call('layer1.bn')}" in text
        assert "at: " in text
        assert spent < 2
        assert after == 12


def again(rank, folder):
    # the notes of both lives are in one store, as under torchrun, where the agent keeps it
    notes = dist.FileStore(f"{folder}/notes", 2)
    dist.distributed_c10d._get_default_store = lambda: notes
    said = []
    for life in range(2):
        if life:
            dist.destroy_process_group()
            store = dist.FileStore(f"{folder}/{life}", 2)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        speak = conversation(dist.group.WORLD)
        with pytest.raises(BatchNormError) as raised:
            speak.rows(call(f"life {life} of rank {rank}"), torch.zeros(4, dtype=torch.float64))
        said.append(str(raised.value))
    return said


def test_what_was_written_for_a_job_before_this_one_is_not_heard(tmp_path):
    for said in run(again, 2, str(tmp_path)):
        for life, text in enumerate(said):
            for rank in (0, 1):
                assert f"rank {rank} is in 'life {life} of rank {rank}'" in text


def momentum_that_changes(rank):
    speak = conversation(dist.group.WORLD)
    number = dist.group.WORLD._get_sequence_number_for_group
    sent = []
    for step in range(5):
        before = number()
        for path in "ab":
            mine = call(path)._replace(settings=f"momentum {1 / (step + 2)}")
            speak.rows(mine, torch.zeros(4, dtype=torch.float64))
        sent.append(number() - before)
    return sent


def test_an_option_that_changes_from_step_to_step_costs_no_message():
    assert [sent[2:] for sent in run(momentum_that_changes, 2)] == [[2, 2, 2]] * 2


def disagree_late(rank):
    module.deferred = lambda data: True
    speak = conversation(dist.group.WORLD)
    told = []
    for step in range(6):
        for name in ("a", "b"):
            # the layers are swapped on rank 1 in one step; what came is looked at when the next call comes
            swapped = step == 4 and rank == 1
            mine = call({"a": "b", "b": "a"}[name] if swapped else name)
            try:
                rows = speak.rows(mine, torch.ones(4, dtype=torch.float64))
                told.append(bool(rows.isnan().all()))
            except BatchNormError as error:
                return told, str(error)
    return told, ""


def test_where_a_device_is_not_waited_for_the_error_comes_a_call_later_and_numbers_are_nan_until_then():
    results = outcomes_of(disagree_late, 2, timeout=2)
    told, text = results[0].result
    assert told == [False] * 8 + [True]
    assert "rank 1 is in 'b'" in text
    # rank 1 knew that it was not in the call that everybody expected, and looked at once
    told, text = results[1].result
    assert told == [False] * 8
    assert "rank 0 is in 'a'" in text


# -- absence ---------------------------------------------------------------------------------------------------
def absent(rank, who, how):
    speak = conversation(dist.group.WORLD)
    for _ in range(2):
        speak.rows(call("layer1.bn", 4), torch.zeros(4, dtype=torch.float64))
    if rank == who:
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "sleeps":
            time.sleep(6)
        return None
    try:
        speak.rows(call("layer1.bn", 4), torch.zeros(4, dtype=torch.float64))
    except BatchNormError as error:
        first = str(error)
    with pytest.raises(BatchNormError, match="earlier message"):
        speak.rows(call("layer1.bn", 4), torch.zeros(4, dtype=torch.float64))
    return first


ABSENCES = [
    (who, how, store) for store in ("tcp", "file") for how in ("dies", "sleeps", "leaves") for who in (0, 1)
]
QUICK = [(1, "dies", "tcp"), (0, "dies", "tcp")]


@pytest.mark.parametrize(
    ("who", "how", "store"),
    [a if a in QUICK else pytest.param(*a, marks=pytest.mark.slow) for a in ABSENCES],
)
def test_who_did_not_come_is_named(who, how, store):
    outcomes = outcomes_of(absent, 4, who, how, timeout=2, store=store)
    for rank, outcome in enumerate(outcomes):
        if rank == who:
            assert outcome.code == (-signal.SIGKILL if how == "dies" else 0), outcome.trace
            continue
        assert outcome.code == 0, outcome.trace
        assert "'layer1.bn'" in outcome.result
        assert f"rank {who} did not" in outcome.result or (
            who == 0 and "rank 0 does not answer" in outcome.result
        ), outcome.result
        assert outcome.seconds < 2 + 5
