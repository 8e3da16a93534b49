"""What one start of a run spends its time on, noted while it runs: lines appended to WORKDIR/goodput.jsonl.

At every moment one part of `PARTS` (training/goodput.py) is open, so that the parts of a start add up to its wall
clock. A thread of process 0 appends a line every second, less often as the start grows older (a thousandth of its
age): what a killed start did is known to about 0.1%. The next start leaves only what is needed of them. A line is one
`write` of some 200 bytes and never an fsync; it outlives SIGKILL, and its last seconds may be lost with the machine. A
workdir in a bucket gets the file at every checkpoint and once a minute, from the same thread. A file that cannot be
written costs the record, never the run.

Each line: {"start", "time", "part", "step", "seconds": {part: seconds so far}, "done": the same of the productive parts
when `step` was done, "event": ...}. Events: "begin" (with "format", "began", and "found": the last row of metrics.jsonl
before rows of lost steps are cut), "restored" (with "from", the updates done, and "entry", the index in the manifest),
"save" (a checkpoint of `step` begins), "end" (with "how"). training/starts.py reads them. A later layout counts its
`FORMAT` up, and keeps "start" in each line and "format" in the begin: older programs leave its lines as they are.
"""

import contextlib
import json
import os
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

from t5x_like.core.errors import UserError
from t5x_like.core.metrics import last_row
from t5x_like.storage import paths
from t5x_like.training.goodput import PARTS, productive
from t5x_like.training.starts import FORMAT, NAME, compacted, quiet, read_lines

_UPLOAD = 60.0  # s between two uploads to a bucket, or as long as ten lines take


class Ledger:
    """The clock of one start. `began`: seconds since 1970, as all times here. Parts are named by one thread alone."""

    def __init__(self, began: float, *, clock: Callable[[], float] | None = None) -> None:
        # The wall clock may be set while we run: it is read once, and a steady clock goes on from there.
        offset = time.time() - time.monotonic()
        self.now = clock or (lambda: time.monotonic() + offset)
        self.began = min(began, self.now())
        self._lock = threading.Lock()  # around what is counted; never held while a file is written
        self._writing = threading.Lock()
        self._seconds: dict[str, float] = defaultdict(float)
        self._done: dict[str, float] = {}
        self._step = 0
        self._open = ["startup"]
        self._since = self.began
        self._file: _File | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    # Parts.

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The time inside is of this part, but for what is inside of another one."""
        self._switch([*self._open, self._known(name)])
        try:
            yield
        finally:
            self._switch(self._open[:-1])

    def goes_on(self, name: str) -> None:
        """What is in no other part belongs to this one from now on: startup, then steps, then closing."""
        self._switch([self._known(name), *self._open[1:]])

    def step_done(self, step: int) -> None:
        """`step` updates are done: their time counts once this start is followed by another."""
        with self._lock:
            self._count()
            self._step = step
            self._done = productive(self._seconds)

    def totals(self) -> dict[str, float]:
        """Seconds of every part so far; their sum is the age of this start."""
        with self._lock:
            self._count()
            return dict(self._seconds)

    def _known(self, name: str) -> str:
        if name not in PARTS:
            raise ValueError(f"{name!r} is none of {', '.join(PARTS)}")
        return name

    def _switch(self, parts: list[str]) -> None:
        with self._lock:
            self._count()
            self._open = parts

    def _count(self) -> None:
        now = self.now()
        self._seconds[self._open[-1]] += now - self._since
        self._since = now

    # The record.

    @property
    def path(self) -> str | None:
        """The local file that lines go to, while this start is written down."""
        return self._file and self._file.local

    def record(self, workdir: str) -> None:
        """From here on this start is written down. Only one process of a run does."""
        with contextlib.suppress(OSError, UserError):
            self._file = _File(workdir)
        if self._file is None:
            return
        found = self._file.last_row()
        self.note("begin", format=FORMAT, began=round(self.began, 3), **({"found": found} if found else {}))
        self._thread = threading.Thread(target=self._beat, name="ledger", daemon=True)
        self._thread.start()

    def note(self, event: str = "", **facts: Any) -> None:
        """Appends a line about this moment."""
        if self._file is None:
            return
        with self._writing:  # so that lines are in the order of their times
            with self._lock:
                self._count()
                line = {
                    "start": self._file.start,
                    "time": round(self._since, 3),
                    "part": self._open[-1],
                    "step": self._step,
                    "seconds": _rounded(self._seconds),
                    "done": _rounded(self._done),
                }
            self._file.append({**({"event": event} if event else {}), **line, **facts})

    def restored(self, step: int, entry: int) -> None:
        """This start goes on from `step` updates; `entry` is its index in the manifest."""
        with self._lock:
            self._count()
            self._step, self._done = step, productive(self._seconds)
        self.note("restored", **{"from": step, "entry": entry})
        if self._file is not None:
            self._file.due = True  # the manifest is about to name this start

    def save(self, step: int) -> None:
        """A checkpoint of `step` begins: whoever goes on from it finds what was spent until here."""
        del step  # which is the last that was done
        self.note("save")
        if self._file is not None:
            self._file.due = True

    def end(self, how: str) -> None:
        """The last line. Twice is once."""
        if not self._closed.is_set():
            self._closed.set()
            self.note("end", how=how)

    def close(self) -> None:
        """Puts the record where it belongs, after `end`."""
        if self._thread is not None:
            self._thread.join(5)  # it may be within an upload
        if self._file is not None:
            self._file.close()

    def _beat(self) -> None:
        while not self._closed.wait(every := quiet(self.now() - self.began)):
            self.note()
            if self._file is not None:
                self._file.upload(every=max(_UPLOAD, 10 * every))


class _File:
    """goodput.jsonl of a workdir, open for appending; of one in a bucket a local copy, which is uploaded."""

    def __init__(self, workdir: str) -> None:
        self._target = paths.join(workdir, NAME)
        self._metrics = paths.join(workdir, "metrics.jsonl")
        self.due, self._uploaded = False, time.monotonic()
        self._folder = tempfile.TemporaryDirectory(prefix="t5x_like-goodput-") if paths.is_remote(workdir) else None
        self.local = self._target if self._folder is None else os.path.join(self._folder.name, NAME)
        if self._folder is not None and paths.exists(self._target):
            paths.copy_file(self._target, self.local)
        earlier = list(read_lines(self.local))
        self._compact(earlier)
        self.start = 1 + max((line["start"] for line in earlier), default=0)
        self._file: IO[bytes] = open(self.local, "ab", buffering=0)
        if self._file.tell() and not _ends_whole(self.local):
            self._file.write(b"\n")  # after a writer that was killed within a line

    def _compact(self, lines: list[dict[str, Any]]) -> None:
        """Leaves of earlier starts the lines that are needed, so that a run of many starts keeps a small file."""
        kept = compacted(lines)
        if len(kept) < len(lines):
            with contextlib.suppress(OSError, UserError):
                content = "".join(f"{json.dumps(line)}\n" for line in kept)
                paths.write_text_atomic(self.local, content)

    def last_row(self) -> dict[str, Any] | None:
        """{"step", "time"} of the last row of metrics; None where there is none, or none at hand."""
        if self._folder is not None:
            return None  # a bucket has the rows up to a checkpoint alone
        row = last_row(self._metrics)
        return row and {"step": row["step"], "time": row.get("time", 0.0)}

    def append(self, line: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError, ValueError):  # a full disk; a file that is closed
            self._file.write(json.dumps(line).encode("ascii") + b"\n")

    def upload(self, *, every: float) -> None:
        """To a bucket, if it is time."""
        if self._folder is None or not (self.due or time.monotonic() - self._uploaded > every):
            return
        self.due, self._uploaded = False, time.monotonic()
        with contextlib.suppress(OSError, UserError):
            paths.copy_file(self.local, self._target)

    def close(self) -> None:
        self.due = True
        self.upload(every=0.0)
        with contextlib.suppress(OSError):
            self._file.close()
        if self._folder is not None:
            self._folder.cleanup()


def _ends_whole(path: str) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in seconds.items() if value > 0}
