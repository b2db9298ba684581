"""What a run tells: lines, TensorBoard events, a bar."""

import io
import json
import math
import struct
import sys

import pytest

from trainers.record import FileRecord, Record


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def filled(folder, count=4, **options):
    record = FileRecord(folder, **{"progress": False, **options})
    record.phase("train", 0, 10)
    for step in range(1, count + 1):
        record.advance(step)
        record.log("train", step, {"loss": 1.0 / step, "rate": 0.5})
    return record


def test_a_line_for_every_log_written_at_once(tmp_path):
    record = filled(tmp_path)
    assert lines(tmp_path) == record.history  # before it is closed
    assert lines(tmp_path)[1] == {"phase": "train", "step": 2, "loss": 0.5, "rate": 0.5}
    assert record.lines == 4
    record.close()


def test_equal_runs_have_equal_files(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        filled(tmp_path / name).close()
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == (tmp_path / "b" / "metrics.jsonl").read_bytes()


def test_rewinding_cuts_the_file_and_goes_on(tmp_path):
    record = filled(tmp_path)
    record.rewind(2)
    assert record.lines == 2 and [h["step"] for h in lines(tmp_path)] == [1, 2]
    record.log("train", 3, {"loss": 9.0})
    record.close()
    assert [(h["step"], h["loss"]) for h in lines(tmp_path)] == [(1, 1.0), (2, 0.5), (3, 9.0)]
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


def test_a_new_record_goes_on_with_the_lines_that_are_there(tmp_path):
    filled(tmp_path).close()
    record = FileRecord(tmp_path, progress=False)
    assert record.lines == 4
    record.log("train", 5, {"loss": 0.1})
    record.close()
    assert [h["step"] for h in lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_line_cut_by_a_kill_is_dropped(tmp_path):
    filled(tmp_path).close()
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text()[:-9])
    record = FileRecord(tmp_path, progress=False)
    assert record.lines == 3
    record.rewind(3)
    record.log("train", 4, {"loss": 0.25})
    record.close()
    assert [h["step"] for h in lines(tmp_path)] == [1, 2, 3, 4]


def test_values_that_are_not_finite_are_words_in_valid_json(tmp_path):
    record = FileRecord(tmp_path, progress=False)
    record.log("train", 1, {"loss": math.nan, "big": math.inf, "fine": 1.0})
    record.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "phase": "train", "step": 1, "loss": "nan", "big": "inf", "fine": 1.0,
    }  # fmt: skip


def test_a_process_that_does_not_write_leaves_nothing(tmp_path):
    record = filled(tmp_path, write=False)
    record.rewind(1)
    record.note("hello")
    record.close()
    assert list(tmp_path.iterdir()) == [] and record.lines == 1


def scalars(folder):
    """(tag, step) -> value of every scalar in the event files, decoded by TensorBoard's own protocol."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for file in sorted(folder.glob("events*")):
        data, at = file.read_bytes(), 0
        while at + 12 <= len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
        assert at == len(data), "an event was cut"
    return found


def test_tensorboard_events_hold_every_finite_scalar(tmp_path):
    record = filled(tmp_path)
    record.log("train", 5, {"loss": math.nan, "rate": 0.25})
    record.close()
    found = scalars(tmp_path / "tensorboard")
    assert {step for tag, step in found if tag == "train/loss"} == {1, 2, 3, 4}
    assert found["train/loss", 4] == pytest.approx(0.25)
    assert found["train/rate", 5] == pytest.approx(0.25)
    assert all(v > 0 for (tag, _), v in found.items() if tag == "train/steps_per_second")


def test_the_bar_shows_phase_rate_loss_and_time_left(tmp_path, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    record = FileRecord(tmp_path)
    record.phase("warm up", 0, 100)
    record.compiled(1.25)
    for step in range(10, 60, 10):
        record.log("warm up", step, {"loss": 0.125 * step, "other": 7.0})
        record.advance(step)
    record._bar.refresh()
    shown = screen.getvalue().split("\r")[-1]
    record.note("a word")
    record.close()
    assert shown.startswith("warm up:") and "50/100" in shown
    assert "loss 6.25" in shown and "other" not in shown
    assert "step/s" in shown and "<" in shown  # the rate; time gone < time left
    assert "compiled in 1.2 s" in screen.getvalue() and "a word" in screen.getvalue()


def test_a_resumed_phase_starts_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    record = FileRecord(tmp_path)
    record.phase("train", 40, 100)
    assert record._bar.n == 40 and record._bar.total == 100
    record.advance(45)
    assert record._bar.n == 45
    record.phase("next", 0, 3)
    assert record._bar.total == 3
    record.close()


def test_notes_without_a_bar_go_to_standard_error(tmp_path, capsys):
    FileRecord(tmp_path, progress=False).note("a word")
    assert capsys.readouterr() == ("", "a word\n")


def test_closing_twice_is_fine(tmp_path):
    record = filled(tmp_path)
    record.close()
    record.close()


def test_the_silent_record_keeps_its_history(capsys):
    record = Record()
    record.phase("train", 0, 2)
    record.compiled(1.0)
    record.advance(1)
    record.log("train", 1, {"loss": 1.0})
    record.log("train", 2, {"loss": 0.5})
    record.note("a word")
    record.rewind(1)
    record.close()
    assert record.history == [{"phase": "train", "step": 1, "loss": 1.0}] and record.lines == 1
    assert capsys.readouterr() == ("", "")
