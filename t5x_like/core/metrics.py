"""Where numbers go: metrics.jsonl and TensorBoard events. It computes no metric. What a terminal shows: terminal.py.

A row of metrics.jsonl is one JSON object: `step`, `time` (seconds since 1970) and slash names such as `train/loss`.
Floats are written with the shortest digits that give the same bits back. JSON has no NaN: a non-finite value is
written as the string "NaN", "Infinity" or "-Infinity", and `read_rows` turns these back into floats.
All paths are local; who needs gs:// stages the file and uploads it (see training/telemetry.py).
"""

import contextlib
import io
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from t5x_like.core.errors import UserError

NON_FINITE = ("NaN", "Infinity", "-Infinity")
_log = logging.getLogger(__name__)


class JsonlWriter:
    """Appends rows to one file. A row is on its way to the disk when `write` returns, and on it after `flush`.

    A disk that is full does not end a run: rows that could not be written are kept, one warning is logged, and they
    go out with a later `write` or `flush`; `close` raises UserError if some never could.
    """

    def __init__(self, path: str, *, clock: Callable[[], float] = time.time):
        self._path = path
        self._clock = clock
        self._waiting = b""
        self._warned = False
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        self._file: io.FileIO | None = None
        self._open()

    def write(self, step: int, values: Mapping[str, float]) -> dict[str, Any]:
        """Appends one row and returns it."""
        row: dict[str, Any] = {"step": int(step), "time": round(self._clock(), 3)}
        for name, value in values.items():
            if name in ("step", "time"):
                raise ValueError(f"a metric may not be called {name!r}: the row has that field already")
            row[name] = value if isinstance(value, int) else float(value)
        text = json.dumps({name: to_json(value) for name, value in row.items()}, allow_nan=False)
        self._waiting += text.encode("ascii") + b"\n"
        self._drain()
        return row

    def truncate_after(self, step: int) -> None:
        """Drops all rows of later steps, whole file or nothing: it is rewritten beside itself and renamed."""
        self._close_file()
        temporary = f"{self._path}.tmp"
        with open(temporary, "w", encoding="ascii") as out:
            for row in read_rows(self._path):
                if row["step"] <= step:
                    out.write(json.dumps({name: to_json(value) for name, value in row.items()}) + "\n")
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, self._path)
        self._open()

    def flush(self) -> None:
        """Puts what was written onto the disk."""
        self._drain()
        if self._file is not None and not self._waiting:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self.flush()
        self._close_file()
        if self._waiting:
            rows = self._waiting.count(b"\n")
            raise UserError(f"{self._path}: the last {rows} rows could not be written; free disk space and start again")

    def _open(self) -> None:
        self._file = open(self._path, "r+b" if os.path.exists(self._path) else "w+b", buffering=0)
        self._end = _whole_lines(self._file)
        self._file.truncate(self._end)

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _drain(self) -> None:
        if self._file is None or not self._waiting:
            return
        try:
            self._file.seek(self._end)
            sent = 0
            while sent < len(self._waiting):
                sent += self._file.write(self._waiting[sent:]) or 0
            self._end += sent
            self._waiting = b""
            self._warned = False
        except OSError as error:
            self._file.truncate(self._end)
            if not self._warned:
                _log.warning("%s: cannot write (%s); rows are kept in memory and tried again", self._path, error)
                self._warned = True


def is_measurement(name: str) -> bool:
    """Whether a field of a row may differ between two runs that are equal bit for bit.

    >>> is_measurement("train/loss"), is_measurement("train/mfu"), is_measurement("time")
    (False, True, True)
    """
    rates = ("train/tokens_per_second", "train/model_flops_per_second", "train/mfu", "train/step_seconds")
    return name == "time" or name in rates or name.startswith(("time/", "memory/", "goodput/"))


def read_rows(path: str) -> Iterator[dict[str, Any]]:
    """The rows of a metrics.jsonl in order. A last line without its end (a killed writer) is left out.

    Raises UserError for any other line that is not a JSON object with a `step`.
    """
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
                step = row["step"]
            except (ValueError, TypeError, KeyError):
                step = None
            if not isinstance(step, int):
                raise UserError(f"{path}:{number} is not a row of metrics (a JSON object with a step): {line[:60]!r}")
            yield {name: float(value) if value in NON_FINITE else value for name, value in row.items()}


def last_row(path: str) -> dict[str, Any] | None:
    """The last whole row of a metrics.jsonl, found from its end; None where there is no file or no row."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return None
    for line in reversed(lines):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            if isinstance(row["step"], int):
                return row
    return None


def to_json(value: Any) -> Any:
    """A number as JSON can hold it: what is not finite becomes a text."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _whole_lines(file: io.FileIO) -> int:
    """The size of the file up to its last line end: a writer that was killed may have left part of a row."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 65536)
        file.seek(start)
        found = (file.read(end - start) or b"").rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


class TensorBoardWriter:
    """Scalars as TensorBoard events. `restored_step` hides what an earlier start wrote for later steps.

    Written through the library's synchronous layer: its usual writer hands events to a thread over a bounded queue,
    which `flush` does not empty and on which the caller waits for ever once that thread met a full disk.
    """

    def __init__(self, directory: str, *, restored_step: int | None = None, clock: Callable[[], float] = time.time):
        # Imported here: it imports torch where torch is installed, which takes seconds.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        events: Any = event_pb2  # generated code, which no type checker sees into
        summaries: Any = summary_pb2
        self._clock = clock
        self._event, self._summary, self._value = events.Event, summaries.Summary, summaries.Summary.Value
        self._writer: Any = None
        # The name of a file of events ends in whole seconds: two quick starts must not share one.
        name = f".{os.getpid()}.{time.monotonic_ns()}"
        try:
            os.makedirs(directory, exist_ok=True)
            self._writer = EventsWriter(os.path.join(directory, "events"), name)
        except OSError as error:
            _log.warning("no TensorBoard events: %s", error)
        if restored_step is not None:
            start = events.SessionLog(status=events.SessionLog.START)
            self._add(self._event(step=restored_step + 1, session_log=start))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [self._value(tag=name, simple_value=float(value)) for name, value in values.items()]
        self._add(self._event(step=int(step), summary=self._summary(value=scalars)))

    def flush(self) -> None:
        self._guarded(lambda writer: writer.flush())

    def close(self) -> None:
        self._guarded(lambda writer: writer.close())
        self._writer = None

    def _add(self, event: Any) -> None:
        event.wall_time = self._clock()
        self._guarded(lambda writer: writer.write_event(event))

    def _guarded(self, action: Callable[[Any], Any]) -> None:
        """Curves for the eye must not end a run: at the first failure the events stop, with one warning."""
        if self._writer is None:
            return
        try:
            action(self._writer)
        except OSError as error:
            _log.warning("TensorBoard events stop here: %s", error)
            self._writer = None
