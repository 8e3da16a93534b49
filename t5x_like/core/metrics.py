"""Where numbers go: metrics.jsonl, TensorBoard events, and the progress line of a terminal. It computes no metric.

A row of metrics.jsonl is one JSON object: `step`, `time` (seconds since 1970) and slash names such as `train/loss`.
Floats are written with the shortest digits that give the same bits back. JSON has no NaN: a non-finite value is
written as the string "NaN", "Infinity" or "-Infinity", and `read_rows` turns these back into floats.
All paths are local; who needs gs:// stages the file and uploads it (see training/telemetry.py).
"""

import io
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

from t5x_like.core.errors import UserError

_NON_FINITE = ("NaN", "Infinity", "-Infinity")
_log = logging.getLogger(__name__)


def format_count(count: float) -> str:
    """A count to three digits.

    >>> format_count(987), format_count(30_412_800), format_count(2.4e12)
    ('987', '30.4M', '2.40T')
    """
    for limit, suffix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= limit * 0.9995:
            return _three_digits(count / limit) + suffix
    return f"{count:g}" if float(count).is_integer() else _three_digits(count)


def format_bytes(size: float) -> str:
    """Bytes in binary units.

    >>> format_bytes(512), format_bytes(1536), format_bytes(18.6 * 2**30)
    ('512 B', '1.50 KiB', '18.6 GiB')
    """
    for power, suffix in ((5, "PiB"), (4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(size) >= 1024**power * 0.9995:
            return f"{_three_digits(size / 1024**power)} {suffix}"
    return f"{size:.0f} B"


def format_duration(seconds: float) -> str:
    """Seconds as a person says them; `?` where there is no estimate.

    >>> format_duration(3.21), format_duration(75), format_duration(8040), format_duration(float("inf"))
    ('3.2 s', '1:15', '2:14:00', '?')
    """
    if not math.isfinite(seconds):
        return "?"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02d}:{minutes:02d}:{rest:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _three_digits(value: float) -> str:
    return f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f}"


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
        text = json.dumps({name: _to_json(value) for name, value in row.items()}, allow_nan=False)
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
                    out.write(json.dumps({name: _to_json(value) for name, value in row.items()}) + "\n")
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
    return name == "time" or name in rates or name.startswith(("time/", "memory/"))


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
            yield {name: float(value) if value in _NON_FINITE else value for name, value in row.items()}


def _to_json(value: float) -> float | str:
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


class Progress:
    """How far a long action is: one live line with rate and ETA on a terminal, a plain line now and then elsewhere.

    `total` may be None. The rate is of this process: `done` at the start counts as given. Use as a context manager.

    >>> ticks = iter([0.0, 20.0, 20.0])
    >>> out = io.StringIO()
    >>> with Progress(100, label="prepare", unit="files", stream=out, clock=lambda: next(ticks)) as progress:
    ...     progress.update(50)
    >>> print(out.getvalue(), end="")
    prepare: 50/100 files (50%), 2.50 files/s, ETA 0:20
    """

    def __init__(
        self,
        total: int | None,
        *,
        label: str,
        unit: str,
        done: int = 0,
        stream: IO[str] | None = None,
        plain_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._label, self._unit = total, label, unit
        self._line = StatusLine(stream if stream is not None else sys.stderr)
        self._clock = clock
        self._begin = self._shown = clock()
        self._first = self._done = done
        self._interval = 0.1 if self._line.live else plain_seconds
        self._ended_at: int | None = None

    def update(self, done: int, note: str = "") -> None:
        """`done` units of the total are done; `note` is shown behind them."""
        self._done = done
        now = self._clock()
        if now - self._shown >= self._interval or done == self._total:
            self._shown = now
            self._ended_at = done
            self._line.show(self._text(now, note))

    def close(self) -> None:
        """Ends the line, showing the last count if it was not shown yet."""
        if self._done != self._first and self._ended_at != self._done:
            self._line.show(self._text(self._clock(), ""))
        self._line.end()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _text(self, now: float, note: str) -> str:
        rate = (self._done - self._first) / max(now - self._begin, 1e-9)
        text = f"{self._label}: {self._done}"
        if self._total is not None:
            text += f"/{self._total} {self._unit} ({100 * self._done / max(self._total, 1):.0f}%)"
        else:
            text += f" {self._unit}"
        text += f", {format_count(rate)} {self._unit}/s"
        if self._total is not None and self._done < self._total:
            text += f", ETA {format_duration((self._total - self._done) / rate if rate else math.inf)}"
        return f"{text}, {note}" if note else text


class StatusLine:
    """One line of a terminal that is written over in place; on any other stream, plain lines."""

    def __init__(self, stream: IO[str]):
        self._stream = stream
        self.live = bool(getattr(stream, "isatty", lambda: False)()) and os.environ.get("TERM") != "dumb"
        self._open = False

    def show(self, text: str) -> None:
        """Replaces the live line, or prints a plain one."""
        if self.live:
            try:
                width = os.get_terminal_size(self._stream.fileno()).columns
            except OSError:
                width = 80
            # A line that wraps could not be written over.
            self._write(f"\r\x1b[2K{text[: max(width, 20) - 1]}")
            self._open = True
        else:
            self._write(text + "\n")

    def print(self, text: str) -> None:
        """A line that stays, above the live one."""
        self._write(("\r\x1b[2K" if self._open else "") + text + "\n")
        self._open = False

    def end(self) -> None:
        """Leaves the live line where it stands; what follows begins on a new one."""
        if self._open:
            self._write("\n")
            self._open = False

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            # The reader of our output went away (a closed pipe or terminal). The work it watched goes on.
            self.live = False
