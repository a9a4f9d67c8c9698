"""Records survive a stop in the middle of a line, and damage is never taken for data."""

import json
import math

import pytest

from batchnorm.errors import DataError
from batchnorm_lab.studies.records import RecordFile, select, values


def test_records_come_back_from_the_file(tmp_path):
    path = tmp_path / "folder" / "records.jsonl"
    RecordFile(path).add([{"key": "a", "result": 1.5}, {"key": "b", "result": [1, None]}])
    again = RecordFile(path)
    assert [again["a"]["result"], again["b"]["result"]] == [1.5, [1, None]]
    again.add([{"key": "c", "result": 3}])
    assert [record["key"] for record in RecordFile(path).all()] == ["a", "b", "c"]


def test_a_key_that_is_there_is_not_written_again(tmp_path):
    path = tmp_path / "records.jsonl"
    RecordFile(path).add([{"key": "a", "result": 1}])
    RecordFile(path).add([{"key": "a", "result": 2}])
    assert path.read_text().count("\n") == 1
    assert RecordFile(path)["a"]["result"] == 1


def test_a_line_cut_short_by_a_stop_is_dropped_and_the_file_can_be_added_to(tmp_path):
    path = tmp_path / "records.jsonl"
    RecordFile(path).add([{"key": "a"}, {"key": "b"}])
    path.write_text(path.read_text()[:-4])
    records = RecordFile(path)
    assert "a" in records
    assert "b" not in records
    records.add([{"key": "b"}])
    assert [record["key"] for record in RecordFile(path).all()] == ["a", "b"]


@pytest.mark.parametrize("line", ["not json", "[1, 2]", '{"no": "key"}', "7"])
def test_a_damaged_line_is_an_error_and_the_file_is_left_alone(tmp_path, line):
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps({"key": "a"}) + "\n" + line + "\n")
    before = path.read_text()
    with pytest.raises(DataError, match="line 2"):
        RecordFile(path)
    assert path.read_text() == before


def test_what_is_not_finite_is_null_in_the_file_and_in_memory(tmp_path):
    path = tmp_path / "records.jsonl"
    records = RecordFile(path)
    records.add([{"key": "a", "result": {"loss": [1.0, math.nan, math.inf]}}])
    assert records["a"]["result"]["loss"] == [1.0, None, None]
    assert json.loads(path.read_text())["result"]["loss"] == [1.0, None, None]


def test_select_and_values_follow_the_order_of_the_seeds():
    records = [{"setting": {"arm": "x", "seed": s}, "result": {"accuracy": 10 * s}} for s in (2, 0, 1)]
    records.append({"setting": {"arm": "y", "seed": 0}, "result": {"accuracy": -1}})
    assert [record["setting"]["seed"] for record in select(records, arm="x")] == [0, 1, 2]
    assert values(records, "accuracy", arm="x") == [0, 10, 20]
    assert values(records, lambda r: r["accuracy"] + 1, arm="y") == [0]
