"""Starts of a run by a script, with a clock that moves when it is told to: for tests of where the time went."""

import json

from t5x_like.training import goodput, starts
from t5x_like.training.ledger import Ledger


class Clock:
    """Moves when it is told to."""

    def __init__(self, now):
        self.now = now

    def __call__(self):
        return self.now


class Run:
    """Starts of a run that spend their time by a script, with the rows of metrics that a real one leaves."""

    def __init__(self, folder, now=1000.0):
        self.folder, self.clock, self.entries = folder, Clock(now), 0
        self.rows = folder / "metrics.jsonl"

    def start(self, first, *, idle=0.0, before=2.0):
        """Begins, `before` seconds of which each are startup, preparing, restoring and compiling."""
        self.clock.now += idle
        self.ledger = Ledger(self.clock.now, clock=self.clock)
        self.clock.now += before
        self.ledger.record(str(self.folder))
        self.step = first
        with self.ledger.part("prepare"):
            self.clock.now += before
        with self.ledger.part("restore"):
            self.clock.now += before
        self.ledger.restored(first, self.entries)
        self.entries += 1
        kept = [row for row in self._rows() if row["step"] <= first]
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in kept))
        with self.ledger.part("compile"):
            self.clock.now += before
        self.ledger.goes_on("steps")

    def steps(self, count, *, seconds=1.0, waits=0.25, row=True, noted=True):
        """Takes steps, and writes the line that the thread writes every second; not `noted`, none for the last one."""
        for index in range(count):
            with self.ledger.part("input"):
                self.clock.now += waits
            self.clock.now += seconds - waits
            self.step += 1
            self.ledger.step_done(self.step)
            if row:
                with open(self.rows, "a") as file:
                    file.write(json.dumps({"step": self.step, "time": self.clock.now}) + "\n")
            if noted or index < count - 1:
                self.ledger.note()

    def save(self, seconds=0.5):
        self.ledger.save(self.step)
        with self.ledger.part("checkpoint"):
            self.clock.now += seconds
        self.ledger.note()  # as the thread does within a second

    def kill(self):
        """Nothing more is written, as after SIGKILL."""
        assert self.ledger._file is not None
        self.ledger._closed.set()
        self.ledger._file.close()

    def end(self, how="finished"):
        self.ledger.end(how)
        self.ledger.close()

    def _rows(self):
        return [json.loads(line) for line in self.rows.read_text().splitlines()] if self.rows.exists() else []

    def account(self):
        return goodput.account(starts.read(str(self.folder)))
