"""What a person sees on a terminal: a live line of progress, and counts, bytes and durations in a few digits."""

import math
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import IO


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


_MEASURED = 0.5  # s: what took less, or was done before anybody looked, has no rate


class Progress:
    """How far a long action is: one live line with rate and ETA on a terminal, a plain line now and then elsewhere.

    `total` may be None. The rate is of this process: `done` at the start counts as given. Use as a context manager.

    >>> import io
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
        seconds = now - self._begin
        rate = (self._done - self._first) / seconds if seconds >= _MEASURED else 0.0
        text = f"{self._label}: {self._done}"
        if self._total is not None:
            text += f"/{self._total} {self._unit} ({100 * self._done / max(self._total, 1):.0f}%)"
        else:
            text += f" {self._unit}"
        text += f", {format_count(rate)} {self._unit}/s" if rate else ""
        if self._total is not None and self._done < self._total:
            text += f", ETA {format_duration((self._total - self._done) / rate if rate else math.inf)}"
        return f"{text}, {note}" if note else text


class Waiting:
    """That something goes on which does not say how far it is: a live line with the time since its begin on a terminal,
    one plain line at its begin elsewhere. Use as a context manager.

    >>> import io
    >>> out = io.StringIO()
    >>> with Waiting("compiling", stream=out):
    ...     pass
    >>> out.getvalue()
    'compiling\\n'
    """

    def __init__(self, what: str, *, stream: IO[str] | None = None, seconds: float = 2.0):
        self._what, self._seconds = what, seconds
        self._line = StatusLine(stream if stream is not None else sys.stderr)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._show, name="waiting", daemon=True)

    def _show(self) -> None:
        begin = time.monotonic()
        while not self._over.wait(self._seconds):
            self._line.show(f"{self._what}: {format_duration(time.monotonic() - begin)}")

    def __enter__(self) -> "Waiting":
        self._line.show(self._what)
        if self._line.live:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        self._line.end()


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
