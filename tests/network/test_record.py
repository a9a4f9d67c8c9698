"""The record of what was done to a network: it travels with the network and is no part of its state."""

from __future__ import annotations

import copy
import io

import torch
from torch import nn

from batchnorm.network.record import Record, record, write_record


def _told() -> Record:
    told = Record()
    told.add("conv1", "Conv2d", "folded", "bn1", tool="fold")
    told.leave("fc", "Linear", "an output layer", tool="fold")
    return told


def test_a_network_that_no_tool_touched_has_an_empty_record() -> None:
    assert len(record(nn.Linear(2, 2))) == 0


def test_the_record_survives_copying_and_pickling_and_stays_out_of_the_state_dict() -> None:
    net = write_record(nn.Sequential(nn.Linear(2, 2)), _told())
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(net), torch.load(buffer, weights_only=False)):
        assert record(other).rows == _told().rows
    assert list(net.state_dict()) == ["0.weight", "0.bias"]


def test_a_second_tool_adds_to_the_record_and_a_copy_keeps_its_own() -> None:
    net = write_record(nn.Linear(2, 2), _told())
    other = copy.copy(net)
    write_record(net, _told())
    assert len(record(net)) == 4
    assert len(record(other)) == 2


def test_the_table_shows_paths_and_reasons_whatever_they_contain() -> None:
    told = _told()
    told.leave("head[0]", "Linear", "[bold]not markup[/bold]")
    text = str(told)
    assert "conv1" in text
    assert "an output layer" in text
    assert "[bold]not markup[/bold]" in text
    assert told.reason("fc") == "an output layer"
    assert told.counts() == {"folded": 1, "left alone": 2}
    assert [row.path for row in told.left_alone] == ["fc", "head[0]"]


def test_the_table_prints_in_any_encoding_and_keeps_its_width() -> None:
    told = _told()
    told.leave("größe.é", "Linear", "because of a very long reason, " * 12)
    text = str(told)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 140
    assert text.count("reason") == 13  # the heading too: nothing is cut off
    assert str(Record()) == "nothing done"
