"""Where the wall clock of a run went: parts that add up over any starts, however they ended; steps lost by kills."""

import contextlib
import json
import math
import pathlib
import threading
import time

import pytest

from t5x_like.__main__ import main
from t5x_like.storage import manifest
from t5x_like.training import goodput, starts
from t5x_like.training.ledger import Ledger

ROOT = pathlib.Path(__file__).resolve().parents[2]


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


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def test_the_parts_of_one_start_are_its_wall_clock(run):
    run.start(0)
    run.steps(10)
    with run.ledger.part("evaluate"):
        run.clock.now += 3
    run.save()
    run.ledger.goes_on("closing")
    run.clock.now += 0.5
    run.end()
    found = run.account()
    assert dict(found.seconds) == pytest.approx(
        {"steps": 7.5, "input": 2.5, "evaluate": 3, "checkpoint": 0.5, "closing": 0.5}
        | dict.fromkeys(("startup", "prepare", "restore", "compile"), 2)
    )
    assert found.wall == pytest.approx(run.clock.now - 1000) and found.goodput == pytest.approx(7.5 / 22)
    assert found.lost_steps == 0 and found.rows[0]["ended"] == "finished"


def test_what_is_inside_of_a_part_is_not_of_it_and_an_exception_leaves_it(run):
    with contextlib.suppress(KeyError):
        run.start(0)
        with run.ledger.part("input"):
            run.clock.now += 1
            with run.ledger.part("rollout"):
                run.clock.now += 4
            run.clock.now += 1
            raise KeyError
    run.clock.now += 8
    found = run.ledger.totals()
    assert (found["input"], found["rollout"], found["steps"]) == (2, 4, 8)
    with pytest.raises(ValueError, match="is none of"), run.ledger.part("lunch"):
        pass


def test_a_run_killed_twice_loses_the_steps_that_were_done_again_where_they_were_done_first(run):
    run.start(0)
    run.steps(20)
    run.save()
    run.steps(5, noted=False)
    run.kill()
    run.start(20, idle=30)
    run.steps(10)
    run.save()
    run.steps(7, noted=False)
    run.clock.now += 0.75  # of a step that never ended, which no line tells
    run.kill()
    run.start(30, idle=60)
    run.steps(10)
    run.save()
    run.end()
    found = run.account()
    assert [row["lost_steps"] for row in found.rows] == [5, 7, 0] and found.lost_steps == 12
    assert [row["ended"] for row in found.rows] == ["killed", "killed", "finished"]
    assert [(row["first_step"], row["last_step"]) for row in found.rows] == [(0, 25), (20, 37), (30, 40)]
    # The last rows of a killed start tell of 25 and 37 steps, though no line of the record does.
    assert found.wall == pytest.approx(run.clock.now - 1000, abs=0.02)
    assert found.seconds["steps"] == pytest.approx(40 * 0.75)
    assert found.seconds["idle"] == pytest.approx(30 + 60 + 0.75)
    assert found.seconds["lost"] + found.seconds["steps"] + found.seconds["input"] == pytest.approx(52)


def test_a_start_that_falls_back_behind_another_loses_the_steps_of_both(run):
    """Two kills before the next checkpoint: the second start does steps again that the third does once more."""
    run.start(0)
    run.steps(20)
    run.save()
    run.steps(5)
    run.kill()
    run.start(20)
    run.steps(3)
    run.kill()
    run.start(20)
    run.steps(20)
    run.end()
    found = run.account()
    assert [row["lost_steps"] for row in found.rows] == [5, 3, 0]
    assert found.seconds["steps"] == pytest.approx(40 * 0.75)
    run.start(10)  # both newer checkpoints were damaged
    run.steps(1)
    run.end("stopped")
    again = run.account()
    assert [row["lost_steps"] for row in again.rows] == [15, 3, 20, 0]
    assert again.seconds["steps"] == pytest.approx(11 * 0.75 - 10 * 0.75), "no line tells what was spent by step 10"
    assert again.wall == pytest.approx(run.clock.now - 1000, abs=0.02)


def test_starts_that_fail_before_their_first_step_are_starting_and_no_loss(run):
    run.start(0)
    run.steps(10)
    run.save()
    run.end("stopped")
    ledger = Ledger(run.clock.now, clock=run.clock)
    ledger.record(str(run.folder))
    with ledger.part("prepare"):
        run.clock.now += 7
    ledger.end("UserError: the data has changed")
    ledger.close()
    run.start(10)
    run.steps(5)
    run.end()
    found = run.account()
    assert found.seconds["prepare"] == pytest.approx(2 + 7 + 2) and "lost" not in found.seconds
    assert [row["first_step"] for row in found.rows] == [0, None, 10] and found.lost_steps == 0
    assert found.wall == pytest.approx(run.clock.now - 1000)


def test_a_torn_line_and_a_disk_that_is_full_cost_a_line(run):
    run.start(0)
    run.steps(1, noted=False)
    run.save()
    run.kill()
    path = run.folder / starts.NAME
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"start": 1, "sec')
    run.start(1)
    run.steps(1)
    run.ledger._file._file.close()  # nothing can be written any more
    run.ledger.note()
    run.ledger.end("finished")
    run.ledger.close()
    assert [row["number"] for row in run.account().rows] == [1, 2]
    assert path.read_bytes().startswith(whole + b'{"start": 1, "sec\n{"event": "begin"')


def test_a_later_start_keeps_what_is_needed_of_earlier_ones(run):
    run.start(0)
    run.steps(50)
    run.save()
    run.steps(3)
    run.kill()
    run.start(50)
    run.kill()
    lines = (run.folder / starts.NAME).read_text().splitlines()
    assert sum(json.loads(line)["start"] == 1 for line in lines) == 4, "begin, restored, save, the last"
    assert run.account().rows[0]["productive"] == pytest.approx(50 * 0.75)
    assert run.account().rows[0]["lost_steps"] == 3


def test_the_rows_of_a_run_show_the_shares_over_all_starts(run):
    run.start(0)
    run.steps(10)
    run.save()
    run.steps(4)
    run.kill()
    run.start(10, idle=20)
    before = goodput.earlier(starts.read(str(run.folder)), entry=1)
    run.steps(6)
    run.end()
    shown, found = goodput.shares(before, run.ledger.totals()), run.account()
    assert shown["goodput/productive"] == pytest.approx(found.goodput) and shown["goodput/starts"] == 2
    assert shown["goodput/lost"] == pytest.approx(found.seconds["lost"] / found.wall)
    for name in ("idle", "input", "checkpoint", "restore", "compile"):
        assert shown[f"goodput/{name}"] == pytest.approx(found.seconds[name] / found.wall)


def test_a_clock_that_went_back_between_two_starts_makes_no_negative_time(run):
    run.start(0)
    run.steps(5)
    run.save()
    run.end("stopped")
    run.start(5, idle=-7)
    run.steps(5)
    run.end()
    parts = dict.fromkeys(("startup", "prepare", "restore", "compile"), 4.0)
    assert dict(run.account().seconds) == pytest.approx({"steps": 7.5, "input": 2.5, "checkpoint": 0.5} | parts)


def test_a_machine_that_slept_or_whose_clock_was_set_did_no_step_meanwhile(run):
    """The row of the last step has the time of the wall clock, the lines that of a steady one."""
    run.start(0)
    run.steps(100)
    run.save()
    run.steps(10)
    run.kill()
    with open(run.rows, "a") as file:
        file.write(json.dumps({"step": 111, "time": run.clock.now + 3600}) + "\n")
    run.start(100, idle=3700)
    run.end()
    found = run.account()
    assert found.rows[0]["last_step"] == 111 and found.rows[0]["lost"] == pytest.approx(10 * 0.75 + 2)
    assert found.seconds["steps"] == pytest.approx(75) and found.seconds["idle"] == pytest.approx(3700 - 2)


def test_a_start_of_which_there_is_no_line_stands_where_the_manifest_has_it(run):
    """As in a bucket, killed before its first upload."""
    run.start(0)
    run.steps(10)
    run.save()
    run.steps(4)
    run.kill()
    begun, run.entries = run.clock.now + 50, 2
    run.start(10, idle=100)
    run.steps(5)
    run.end()
    shown = [1000 + 6, begun, run.clock.now - 5]
    entries = [
        {"time": time.strftime("%Y-%m-%dT%H:%M:%S+0000", time.gmtime(when)), "resumed_from": first}
        for when, first in zip(shown, (None, 10, 10), strict=True)
    ]
    manifest.write(str(run.folder), {"format": 3, "starts": entries, "finished": {"step": 15, "time": run.clock.now}})
    found = run.account()
    assert found.began == 1000 and [row["recorded"] for row in found.rows] == [True, False, True]
    assert [row["ended"] for row in found.rows] == ["killed", "not recorded", "finished"]
    assert [row["began"] for row in found.rows] == sorted(row["began"] for row in found.rows)
    assert found.lost_steps == 4 and found.seconds["lost"] == pytest.approx(3)
    assert found.seconds["idle"] + found.seconds["unknown"] == pytest.approx(100)
    assert found.wall == pytest.approx(run.clock.now - 1000)


def test_the_record_goes_to_a_bucket_when_the_manifest_names_the_start(run):
    ledger = Ledger(run.clock.now, clock=run.clock)
    ledger.record(str(run.folder))
    assert ledger._file is not None and not ledger._file.due
    ledger.restored(0, 0)
    assert ledger._file.due
    ledger.end("finished")
    ledger.close()


def _lines_of(run):
    return [json.loads(line) for line in (run.folder / starts.NAME).read_text().splitlines()]


def _write_lines(run, lines):
    (run.folder / starts.NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_lines_say_their_format_and_those_that_say_none_are_of_the_first(run):
    run.start(0)
    run.steps(3)
    run.end()
    lines, found = _lines_of(run), run.account()
    assert [line.pop("format") for line in lines if line.get("event") == "begin"] == [1]
    _write_lines(run, lines)
    assert run.account() == found and found.goodput > 0


def test_a_start_of_a_later_format_is_left_alone_and_not_read(run):
    run.start(0)
    run.steps(3)
    run.end("stopped")
    later = [
        {"start": 2, "event": "begin", "format": 2, "found": "no longer a row"},
        {"start": 2, "at": [1, 2, 3]},
        {"start": 2, "at": [4, 5, 6]},
    ]
    _write_lines(run, [*_lines_of(run), *later])
    run.clock.now += 20
    run.entries = 2
    run.start(3)
    run.steps(2)
    run.end()
    assert [line for line in _lines_of(run) if line["start"] == 2] == later
    found = run.account()
    assert [row["last_step"] for row in found.rows] == [3, 5] and found.seconds["idle"] == pytest.approx(20)


@pytest.mark.parametrize(
    "damage",
    [{"seconds": None}, {"seconds": {"steps": "a"}}, {"time": None}, {"step": "x"}, {"seconds": {"steps": math.nan}}],
)
def test_a_start_whose_lines_are_damaged_costs_that_start(run, damage):
    run.start(0)
    run.steps(3)
    run.end("stopped")
    lines = _lines_of(run)
    _write_lines(run, [*lines[:-1], lines[-1] | damage])
    run.start(3)
    run.steps(2)
    run.end()
    assert [row["last_step"] for row in run.account().rows] == [5]


def test_seconds_of_a_part_that_is_not_known_here_stay_in_the_sum(run):
    run.start(0)
    run.steps(3)
    run.end()
    lines = _lines_of(run)
    lines[-1]["seconds"] = {"siesta" if name == "input" else name: s for name, s in lines[-1]["seconds"].items()}
    _write_lines(run, lines)
    found = run.account()
    assert found.seconds["unknown"] == pytest.approx(0.75) and found.wall == pytest.approx(run.clock.now - 1000)


def test_a_start_that_could_not_be_written_down_has_shares_all_the_same(run):
    assert goodput.earlier([], entry=0) | {"starts": 0.0} == dict.fromkeys(goodput.earlier([], entry=0), 0.0)
    run.start(0)
    run.steps(4)
    run.end("stopped")
    before = goodput.earlier(starts.read(str(run.folder)), entry=1)  # a full disk: no line of this start
    assert before["starts"] == 2 and before["productive"] == pytest.approx(3)


def test_the_thread_writes_a_line_a_second_and_never_syncs(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: pytest.fail("a sync"))
    before = threading.active_count()
    ledger = Ledger(time.time())
    ledger.record(str(tmp_path))
    deadline = time.monotonic() + 5
    while len((tmp_path / starts.NAME).read_bytes().splitlines()) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    ledger.end("finished")
    ledger.close()
    lines = [json.loads(line) for line in (tmp_path / starts.NAME).read_text().splitlines()]
    assert 3 <= len(lines) <= 6 and max(len(json.dumps(line)) for line in lines) < 250
    for line in lines:
        assert sum(line["seconds"].values()) == pytest.approx(line["time"] - lines[0]["began"], abs=0.01)
    assert threading.active_count() == before


def test_a_step_reads_the_clock_three_times_and_writes_nothing(run):
    """Some 5 microseconds: a run is not slowed by being counted."""
    run.start(0)
    looks, size = [], (run.folder / starts.NAME).stat().st_size
    run.ledger.now = lambda: looks.append(None) or run.clock.now
    for step in range(100):
        with run.ledger.part("input"):
            pass
        run.ledger.step_done(step)
    assert len(looks) == 300 and (run.folder / starts.NAME).stat().st_size == size
    run.kill()


# Workdirs from before the record.


def _old(folder, *, shares=True):
    """Two starts: 10 steps of 1 s, of which 8 are kept, and after 100 s 4 more, ended."""
    zero = 1_700_000_000
    entries = [
        {"time": "2023-11-14T22:13:20+0000", "resumed_from": None},
        {"time": "2023-11-14T23:15:10+0100", "resumed_from": 8},
    ]
    parts = {"time/compile_share": 0.25, "time/input_share": 0.125} if shares else {}
    rows = [{"step": step, "time": zero + step, **parts} for step in range(1, 9)]
    rows += [{"step": 8 + step, "time": zero + 110 + step, **parts} for step in range(1, 5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest.write(str(folder), {"format": 3, "starts": entries, "finished": {"step": 12, "time": zero + 114.5}})


def test_an_older_workdir_says_what_its_rows_tell_and_what_they_cannot(tmp_path, capsys):
    _old(tmp_path)
    found = goodput.account(starts.read(str(tmp_path)))
    assert dict(found.seconds) == pytest.approx({"compile": 3, "input": 1.5, "steps": 7.5, "unknown": 102.5})
    assert found.wall == pytest.approx(114.5) and found.lost_steps == 0
    assert main(["inspect", str(tmp_path), "--goodput"]) == 0
    shown = capsys.readouterr().out
    assert "lost steps, idle time and starting again cannot be told apart (unknown)" in shown
    assert main(["inspect", str(tmp_path), "--goodput", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["wall_seconds"] == 114.5 and sum(told["seconds"].values()) == pytest.approx(114.5)
    assert [start["ended"] for start in told["starts"]] == ["not recorded", "finished"]


@pytest.mark.parametrize("name", ["format1", "format3"])
def test_runs_of_earlier_formats_have_an_account(name):
    found = goodput.account(starts.read(str(ROOT / "tests" / "specimens" / name / "run")))
    assert found.seconds["compile"] > 0.9 * found.wall > 0 and 0 < found.goodput < 0.1
    assert [row["last_step"] for row in found.rows] == [6]


def test_an_older_workdir_without_shares_has_unknown_time_alone(tmp_path):
    _old(tmp_path, shares=False)
    assert dict(goodput.account(starts.read(str(tmp_path))).seconds) == pytest.approx({"unknown": 114.5})


def test_a_run_that_began_before_the_record_goes_on_with_it(tmp_path):
    _old(tmp_path)
    run = Run(tmp_path, now=1_700_000_200.0)
    run.entries = 2
    run.start(12)
    run.steps(4)
    run.end()
    found = run.account()
    assert [row["number"] for row in found.rows] == [1, 2, 3]
    assert found.seconds["unknown"] == pytest.approx(102.5 + 200 - 114.5) and "idle" not in found.seconds
    assert found.wall == pytest.approx(run.clock.now - 1_700_000_000)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--goodput"], 1, "holds no start of a run"),
        (["--goodput", "--step=3"], 2, "--goodput is about all starts of a run; give it without the others"),
        (["--json"], 2, "--json goes with --goodput"),
    ],
)
def test_wrong_use_is_one_line(tmp_path, arguments, status, message, capsys):
    assert main(["inspect", str(tmp_path), *arguments]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
