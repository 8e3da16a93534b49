"""Where the wall clock of a run went: parts that add up over any starts, however they ended; steps lost by kills."""

import contextlib
import json
import threading
import time

import pytest

from t5x_like.__main__ import main
from t5x_like.training import goodput, starts
from t5x_like.training.ledger import Ledger
from tests.training.recorded_run import Run


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


def test_the_record_goes_to_a_bucket_when_the_manifest_names_the_start(run):
    ledger = Ledger(run.clock.now, clock=run.clock)
    ledger.record(str(run.folder))
    assert ledger._file is not None and not ledger._file.due
    ledger.restored(0, 0)
    assert ledger._file.due
    ledger.end("finished")
    ledger.close()


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
    deadline = time.monotonic() + 30
    while len((tmp_path / starts.NAME).read_bytes().splitlines()) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    ledger.end("finished")
    ledger.close()
    lines = [json.loads(line) for line in (tmp_path / starts.NAME).read_text().splitlines()]
    times = [line["time"] for line in lines[:-1]]  # the last one says the end
    assert len(lines) >= 3 and max(len(json.dumps(line)) for line in lines) < 250
    assert all(later - sooner > 0.99 for sooner, later in zip(times[:-1], times[1:], strict=True))
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
