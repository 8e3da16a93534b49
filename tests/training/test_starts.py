"""What a workdir tells of its starts: lines of any format, damaged or missing ones, workdirs from before the record."""

import json
import math
import pathlib
import time

import pytest

from t5x_like.__main__ import main
from t5x_like.storage import manifest
from t5x_like.training import goodput, starts
from tests.training.recorded_run import Run

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


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
