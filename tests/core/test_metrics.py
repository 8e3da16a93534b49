"""Claims about metrics.jsonl, TensorBoard events and progress lines."""

import io
import json
import math
import os
import struct

import numpy as np
import pytest

from t5x_like.core.errors import UserError
from t5x_like.core.metrics import JsonlWriter, TensorBoardWriter, read_rows
from t5x_like.core.terminal import Progress, StatusLine


class Terminal(io.StringIO):
    def isatty(self):
        return True


class FullDisk(io.FileIO):
    """Takes `room` bytes, then fails as a full disk does."""

    room = 0

    def write(self, data):
        if not self.room:
            raise OSError(28, "No space left on device")
        taken = super().write(bytes(data)[: self.room])
        self.room -= taken
        return taken


def rows(path):
    return list(read_rows(str(path)))


def test_a_float32_comes_back_with_all_its_bits(tmp_path):
    values = np.random.default_rng(0).normal(size=200).astype(np.float32)
    writer = JsonlWriter(str(tmp_path / "m.jsonl"))
    for step, value in enumerate(values):
        writer.write(step, {"train/loss": value})
    writer.close()
    again = np.array([row["train/loss"] for row in rows(tmp_path / "m.jsonl")], np.float32)
    assert again.tobytes() == values.tobytes()


def test_every_line_is_strict_json_even_for_values_that_are_not_finite(tmp_path):
    writer = JsonlWriter(str(tmp_path / "m.jsonl"), clock=lambda: 7.0)
    writer.write(1, {"train/loss": math.nan, "a": math.inf, "b": -math.inf, "n": 3})
    line = (tmp_path / "m.jsonl").read_text()

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    parsed = json.loads(line, parse_constant=refuse)
    assert parsed == {"step": 1, "time": 7.0, "train/loss": "NaN", "a": "Infinity", "b": "-Infinity", "n": 3}
    (row,) = rows(tmp_path / "m.jsonl")
    assert math.isnan(row["train/loss"]) and row["a"] == math.inf and row["b"] == -math.inf


def test_truncating_keeps_rows_up_to_the_step_byte_for_byte_and_writing_goes_on(tmp_path):
    path = tmp_path / "m.jsonl"
    writer = JsonlWriter(str(path), clock=lambda: 1.25)
    for step in range(1, 6):
        writer.write(step, {"train/loss": np.float32(1) / np.float32(step + 2)})
    before = path.read_bytes().splitlines(keepends=True)
    writer.truncate_after(3)
    assert path.read_bytes() == b"".join(before[:3])
    writer.write(4, {"train/loss": 9.0})
    writer.close()
    assert [row["step"] for row in rows(path)] == [1, 2, 3, 4]
    assert os.listdir(tmp_path) == ["m.jsonl"]


def test_half_a_row_left_by_a_killed_writer_is_dropped(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1, "time": 0, "train/loss": 2.0}\n{"step": 2, "ti')
    assert [row["step"] for row in rows(path)] == [1]
    writer = JsonlWriter(str(path))
    writer.write(2, {"train/loss": 1.0})
    writer.close()
    assert [row["step"] for row in rows(path)] == [1, 2]


def test_a_damaged_row_in_the_middle_is_named(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1, "time": 0}\nnonsense\n{"step": 3, "time": 0}\n')
    with pytest.raises(UserError, match=r"m\.jsonl:2 is not a row of metrics"):
        rows(path)


def test_a_full_disk_delays_rows_and_loses_none(tmp_path, caplog):
    path = tmp_path / "m.jsonl"
    writer = JsonlWriter(str(path))
    writer.write(1, {"train/loss": 2.0})
    writer._file.close()
    writer._file = FullDisk(str(path), "r+b")
    FullDisk.room = 10
    writer.write(2, {"train/loss": 1.5})
    writer.write(3, {"train/loss": 1.25})
    assert [row["step"] for row in rows(path)] == [1] and path.read_bytes().endswith(b"\n")
    assert len(caplog.records) == 1 and "No space left" in caplog.text
    with pytest.raises(UserError, match="the last 2 rows could not be written"):
        writer.close()
    again = JsonlWriter(str(path))
    again._waiting = writer._waiting
    again.flush()
    assert [row["step"] for row in rows(path)] == [1, 2, 3]


def events_of(path):
    """The events of one file, read by the format's definition: length, its checksum, data, its checksum."""
    import google_crc32c
    from tensorboardX.proto import event_pb2

    def masked(data):
        crc = google_crc32c.value(data)
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    data, found = path.read_bytes(), []
    while data:
        (length, length_crc), data = struct.unpack_from("<QI", data), data[12:]
        record, (record_crc,), data = data[:length], struct.unpack_from("<I", data, length), data[length + 4 :]
        assert length_crc == masked(struct.pack("<Q", length)) and record_crc == masked(record)
        found.append(event_pb2.Event.FromString(record))
    return found


def test_events_are_well_formed_and_a_resume_hides_what_it_does_again(tmp_path):
    from tensorboardX.proto import event_pb2

    first = TensorBoardWriter(str(tmp_path))
    for step in (1, 2, 3):
        first.write(step, {"train/loss": 1.0 / step})
    first.close()
    second = TensorBoardWriter(str(tmp_path), restored_step=1)
    second.write(2, {"train/loss": 0.5})
    second.flush()
    files = sorted(os.listdir(tmp_path), key=lambda name: os.stat(tmp_path / name).st_mtime_ns)
    assert len(files) == 2
    events = [events_of(tmp_path / name) for name in files]
    assert events[0][0].file_version == "brain.Event:2"
    assert [(event.step, event.summary.value[0].tag) for event in events[0][1:]] == [
        (step, "train/loss") for step in (1, 2, 3)
    ]
    restart, again = events[1][1:]
    assert restart.session_log.status == event_pb2.SessionLog.START and restart.step == 2
    assert again.summary.value[0].simple_value == 0.5
    second.close()


def test_progress_writes_over_one_line_on_a_terminal_and_plain_lines_elsewhere():
    for stream, ending in ((Terminal(), "\n"), (io.StringIO(), "\n")):
        ticks = iter([0.0, 1.0, 20.0, 30.0])
        with Progress(40, label="prepare", unit="rows", stream=stream, clock=lambda: next(ticks)) as progress:  # noqa: B023
            progress.update(1)
            progress.update(20)
            progress.update(30, "shard 2")
        text = stream.getvalue()
        assert text.endswith(ending) and "30/40 rows (75%), 1 rows/s, ETA 0:10, shard 2" in text
        assert text.count("\r") == (3 if isinstance(stream, Terminal) else 0)
        assert text.count("\n") == (1 if isinstance(stream, Terminal) else 2)


def test_a_line_that_stays_stands_above_the_live_one():
    stream = Terminal()
    line = StatusLine(stream)
    line.show("live")
    line.print("stays")
    line.show("live again")
    line.end()
    assert stream.getvalue() == "\r\x1b[2Klive\r\x1b[2Kstays\n\r\x1b[2Klive again\n"


def test_a_closed_output_does_not_end_the_work():
    stream = io.StringIO()
    line = StatusLine(stream)
    stream.close()
    line.print("nobody reads this")
