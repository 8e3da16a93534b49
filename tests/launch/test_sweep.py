"""A sweep on one machine: killed, resumed, with members that fail, and stopped early. Its members are quick_run's."""

import csv
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from launch.sweeps import halving, index, outcomes, results
from launch.sweeps.index import DONE, FAILED, SAVED, STOPPED, Decision, Entry, Index, Settings
from launch.sweeps.members import Member
from launch.sweeps.outcomes import Outcome
from launch.sweeps.pool import Pool, Task
from t5x_like.core.errors import UsageError, UserError
from tests.launch import quick_sweep

ROOT = pathlib.Path(__file__).resolve().parents[2]
RATE = "config.optim.learning_rate"
RATES = f"--sweep.{RATE}=1e-3,3e-3,1e-2,3e-2"
EIGHT = (RATES, "--sweep.seeds=2")
NEW = ("--config=configs/pretrain/test.py", "--config.loop.steps=40")
LOSS = "eval/validation/loss"


def start(folder, *arguments, **environment):
    """A sweep in a process of its own, which can be killed."""
    with open(f"{folder}.txt", "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.launch.quick_sweep", f"--workdir={folder}", *arguments],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


@pytest.fixture
def run(monkeypatch, capfd):
    """(exit status, what it said) of a sweep in this process."""
    monkeypatch.chdir(ROOT)

    def call(folder, *arguments, draws=False, **environment):
        for name in ("QUICK_FAIL", "QUICK_SECONDS"):
            monkeypatch.setenv(name, environment.get(name, ""))
        capfd.readouterr()
        status = quick_sweep.main([f"--workdir={folder}", *arguments], draws=draws)
        return status, "".join(capfd.readouterr())

    return call


def said(folder):
    path = pathlib.Path(f"{folder}.txt")
    return path.read_text() if path.exists() else ""


def starts(folder):
    """{member: process ids of its starts}."""
    found = {}
    for path in sorted(folder.glob("*/log.quick.txt")):
        found[path.parent.name] = [int(each) for each in re.findall(r"^start (\d+)$", path.read_text(), re.M)]
    return found


def steps_done(folder):
    """{member: how many steps its starts made in all}."""
    return {path.parent.name: path.read_text().count("step ") for path in sorted(folder.glob("*/log.quick.txt"))}


def alive(process):
    try:
        return "zombie" not in pathlib.Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


def wait_for(condition, child, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.01)


def rows(folder):
    return list(csv.DictReader((folder / "results.csv").read_text().splitlines()))


def test_a_killed_sweep_goes_on_without_repeating_finished_members(run, tmp_path):
    folder = tmp_path / "sweep"
    child = start(folder, *NEW, *EIGHT, "--max_parallel=2", QUICK_SECONDS="0.01")
    wait_for(lambda: folder.is_dir() and sum(entry.state == DONE for entry in states(folder)) >= 3, child)
    children = [process for processes in starts(folder).values() for process in processes]
    child.kill()
    child.wait()
    deadline = time.monotonic() + 5
    while any(map(alive, children)):
        assert time.monotonic() < deadline, "a member survived its sweep"
        time.sleep(0.01)
    finished = {entry.name for entry in states(folder) if outcomes.finished_step(str(folder / entry.name)) == 40}
    assert 3 <= len(finished) < 8

    status, told = run(folder, "--resume", "--max_parallel=2", draws=True)
    assert status == 0, told
    assert all(entry.state == DONE for entry in states(folder)) and len(starts(folder)) == 8
    assert {name for name, processes in starts(folder).items() if len(processes) == 1} >= finished
    # A step is made again only where its kill came between the step and its checkpoint.
    assert all(40 <= count <= 41 for count in steps_done(folder).values())
    assert [row["member"] for row in rows(folder)][:2] == ["lr-1e-2-seed-0", "lr-1e-2-seed-1"]
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert {path.name for path in folder.glob("*.png")} == {"curves.png", "optim_learning_rate.png", "seed.png"}

    before = starts(folder)
    assert run(folder, "--resume")[0] == 0 and starts(folder) == before


def states(folder):
    return list(index.read(str(folder))) if index.exists(str(folder)) else []


def test_a_sweep_that_is_asked_to_stop_saves_its_members_and_ends_with_75(run, tmp_path):
    folder = tmp_path / "sweep"
    child = start(folder, *NEW, *EIGHT, "--max_parallel=2", QUICK_SECONDS="0.02")
    wait_for(lambda: len(steps_done(folder)) == 2 and all(count > 2 for count in steps_done(folder).values()), child)
    child.send_signal(signal.SIGTERM)
    assert child.wait(20) == 75, said(folder)
    assert sum(entry.state == SAVED for entry in states(folder)) == 2
    assert f"--workdir={folder} --resume goes on" in said(folder)
    status, told = run(folder, "--resume", "--max_parallel=4")
    assert status == 0, told
    assert set(steps_done(folder).values()) == {40}, "no step is lost"


def test_a_second_sweep_in_the_same_folder_is_refused(run, tmp_path):
    folder = tmp_path / "sweep"
    child = start(folder, *NEW, RATES, QUICK_SECONDS="0.02")
    wait_for(lambda: len(steps_done(folder)) == 1, child)
    status, told = run(folder, "--resume")
    assert status == 1 and "is in use by" in told
    child.terminate()
    assert child.wait(20) == 75
    status, told = run(folder, *NEW, RATES)
    assert status == 2 and "holds a sweep already; go on with it by --resume" in told


def test_a_failed_member_is_named_with_its_last_line_and_can_be_retried_alone(run, tmp_path):
    folder = tmp_path / "sweep"
    status, told = run(folder, *NEW, RATES, QUICK_FAIL="lr-1e-3:fault,lr-3e-2:wrong")
    assert status == 1
    assert (
        f"lr-1e-3 failed: ValueError: the disk is on fire; python -m launch.sweep --workdir={folder} --retry=" in told
    )
    assert "lr-3e-2 failed: t5x_like: config.optim.learning_rate is wrong" in told
    assert [entry.state for entry in states(folder)] == [FAILED, DONE, DONE, FAILED]
    assert "ValueError: the disk is on fire" in (folder / "lr-1e-3" / "log.output.txt").read_text()
    assert "- lr-1e-3: ValueError: the disk is on fire" in (folder / "results.md").read_text()
    # What has failed is not tried again unasked.
    assert run(folder, "--resume")[0] == 1 and {name: len(each) for name, each in starts(folder).items()} == {
        "lr-1e-3": 1,
        "lr-1e-2": 1,
        "lr-3e-3": 1,
        "lr-3e-2": 1,
    }
    status, told = run(folder, "--retry=lr-1e-3", QUICK_FAIL="")
    assert status == 1 and "lr-3e-2 failed" in told and "lr-1e-3 failed" not in told
    assert {name: len(each) for name, each in starts(folder).items()}["lr-1e-3"] == 2
    assert run(folder, "--retry=failed")[0] == 0
    assert all(entry.state == DONE for entry in states(folder))
    status, told = run(folder, "--retry=lr-1e-4")
    assert status == 2 and "--retry=lr-1e-4 is no member" in told and "did you mean" in told


def test_a_member_that_fails_before_it_is_judged_does_not_end_the_others(run, tmp_path):
    folder = tmp_path / "sweep"
    for_all = (NEW[0], "--config.loop.steps=4", RATES, f"--metric={LOSS}")
    status, told = run(folder, *for_all, QUICK_FAIL="lr-1e-3:late")
    assert status == 1 and [entry.state for entry in states(folder)] == [FAILED, DONE, DONE, DONE], told
    assert "| lr-1e-3 | 0.001 |  |  |  | 1/4 |" in (folder / "results.md").read_text()


def test_faults_are_restarted_so_many_times_and_preemptions_until_nothing_moves(run, tmp_path):
    folder = tmp_path / "sweep"
    few = (NEW[0], "--config.loop.steps=4", RATES, "--max_restarts=2", "--max_parallel=2")
    status, told = run(folder, *few, QUICK_FAIL="lr-1e-3:fault,lr-3e-3:preempted")
    assert status == 1, told
    found = {name: len(each) for name, each in starts(folder).items()}
    assert found == {"lr-1e-3": 3, "lr-3e-3": 5, "lr-1e-2": 1, "lr-3e-2": 1}
    assert [entry.state for entry in states(folder)] == [FAILED, DONE, DONE, DONE]


def test_a_sweep_takes_new_members_and_no_other_config(run, tmp_path):
    folder = tmp_path / "sweep"
    assert run(folder, *NEW, f"--sweep.{RATE}=1e-3,1e-2")[0] == 0
    status, told = run(folder, *NEW, f"--sweep.{RATE}=1e-2,1e-1", "--resume")
    assert status == 0, told
    assert {name: len(each) for name, each in starts(folder).items()} == {"lr-1e-3": 1, "lr-1e-2": 1, "lr-0p1": 1}
    status, told = run(folder, NEW[0], f"--sweep.{RATE}=1e-2", "--resume")
    assert status == 2 and "is a sweep of" in told
    status, told = run(folder, f"--sweep.{RATE}=1e-2", "--resume")
    assert status == 2 and "needs --config=FILE too" in told


def test_half_of_the_members_stop_at_each_rung_and_can_go_on(run, tmp_path):
    folder = tmp_path / "sweep"
    arguments = (*NEW, *EIGHT, "--halving=2:5", "--max_parallel=4")
    status, told = run(folder, *arguments, QUICK_FAIL="lr-3e-2-seed-0:nan")
    assert status == 0, told
    # 8 members to step 5, 4 of them to 10, 2 to 20, 1 to 40.
    assert sorted(steps_done(folder).values()) == [5] * 4 + [10] * 2 + [20] + [40]
    found = index.read(str(folder))
    assert [decision.steps for decision in found.decisions] == [5, 10, 20]
    assert found.decisions[0].ranking[-1] == ("lr-3e-2-seed-0", None), "what is no number ranks last"
    assert found.decisions[-1].promoted == ("lr-1e-2-seed-0",)
    assert sum(entry.state == STOPPED for entry in found) == 7
    assert (
        told.count(" steps, by eval/validation/loss: ") == 3
        and " goes on; " in told
        and "After 20 steps" in (folder / "results.md").read_text()
    )
    # The members ended by themselves, evaluated and saved, with the schedule of the whole run.
    command = (folder / "lr-1e-3-seed-0" / "log.output.txt").read_text().splitlines()[0]
    assert "--config.loop.steps=5 --config.optim.schedule.steps=40" in command
    # One that was stopped goes on where it was, if it is asked for.
    assert run(folder, "--retry=lr-1e-3-seed-0")[0] == 0
    assert steps_done(folder)["lr-1e-3-seed-0"] == 40 and index.read(str(folder))["lr-1e-3-seed-0"].state == DONE


def test_decisions_do_not_depend_on_kills_or_on_how_many_run_at_once(run, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(one, *NEW, RATES, "--halving=2:5", "--max_parallel=4")[0] == 0
    child = start(two, *NEW, RATES, "--halving=2:5", "--max_parallel=2", QUICK_SECONDS="0.01")
    wait_for(lambda: states(two) and index.read(str(two)).decisions, child)
    time.sleep(0.05)
    child.kill()
    child.wait()
    assert len(index.read(str(two)).decisions) < 3
    assert run(two, "--resume", "--max_parallel=3")[0] == 0
    assert index.read(str(one)).decisions == index.read(str(two)).decisions


def test_an_early_stop_needs_its_metric(run, tmp_path):
    folder = tmp_path / "sweep"
    status, told = run(folder, *NEW, RATES, "--halving=2:5", "--metric=eval/validation/los")
    assert status == 2
    assert "--metric=eval/validation/los is reported by no run; of the member lr-1e-3: did you mean" in told
    # The rung stands; with the right name the sweep goes on from it.
    status, told = run(folder, "--resume", f"--metric={LOSS}")
    assert status == 0 and sorted(steps_done(folder).values()) == [5, 5, 10, 40], told


def test_runs_side_by_side_see_other_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3,5,7")
    command = (sys.executable, "-c", "import os, time; time.sleep(0.1); print(os.environ['CUDA_VISIBLE_DEVICES'])")
    ended = []
    with Pool(2, gpus_each=2) as pool:
        tasks = [Task(name, command, str(tmp_path / name), {}) for name in "abc"]
        pool.run(tasks, begins=lambda task: None, ends=lambda task, how: ended.append(how.said))
    assert sorted(ended[:2]) == ["1,3", "5,7"] and ended[2] in ended[:2]
    with pytest.raises(UsageError, match="too few for 3 runs of 2"):
        Pool(3, gpus_each=2)


# Pure parts.


def test_rungs_end_before_the_whole_run_and_when_one_member_is_left():
    assert halving.rungs((2, 100), 8, 1000) == [100, 200, 400]
    assert halving.rungs((4, 100), 8, 1000) == [100, 400]
    assert halving.rungs((2, 100), 64, 350) == [100, 200]
    assert halving.rungs((3, 1000), 9, 1000) == []
    for text in ("1:5", "2", "2:0", "a:b"):
        with pytest.raises(UsageError, match="SHARE:STEPS"):
            halving.parse(text)


def test_decisions_rank_by_goal_and_need_a_number():
    values = {"a": 1.0, "b": None, "c": 3.0, "d": float("nan"), "e": 1.0}
    low = halving.decide(values, steps=5, share=2, metric="m", goal="min")
    assert low.promoted == ("a", "e") and [name for name, _ in low.ranking] == ["a", "e", "c", "b", "d"]
    assert halving.decide(values, steps=5, share=4, metric="m", goal="max").promoted == ("c",)
    with pytest.raises(UsageError, match="no member has a finite m after 5 steps; the member b has None"):
        halving.decide({"b": None}, steps=5, share=2, metric="m", goal="min")


def made(tmp_path):
    points = {"a": (1e-3, 0), "b": (1e-3, 1), "c": (1e-2, 0), "d": (1e-2, 1)}
    entries = [
        Entry(Member(name, {RATE: rate, "config.seed": seed}), state=DONE, steps=20, starts=1, seconds=2.0, status=0)
        for name, (rate, seed) in points.items()
    ]
    settings = Settings(("--config=x",), "local", {})
    return Index(str(tmp_path), settings, entries, [Decision(5, LOSS, (("c", 2.0), ("a", None)), ("c",))])


def found_outcomes():
    curves = {"a": [3.0, 2.5], "b": [3.2, 2.7], "c": [2.0, 2.2], "d": [2.1, float("nan")]}
    return {name: Outcome(20, 20, {LOSS: ([10, 20], values)}) for name, values in curves.items()}


def test_the_table_ranks_by_the_last_value_and_averages_over_seeds(tmp_path):
    table = results.table(made(tmp_path), found_outcomes())
    assert (table.metric, table.goal) == (LOSS, "min")
    assert [result.entry.name for result in table.results] == ["c", "a", "b", "d"]
    assert (table.results[0].best, table.results[0].best_step) == (2.0, 10)
    text = results.markdown(table, "rates")
    assert "| 1 | c | 0.01 | 0 | 2.2 | 2 | 10 | 20/20 | 2 | done |" in text
    assert "| 0.001 | 2.6 | 0.141421 | 2 |" in text and "| 0.01 | 2.2 |  | 1 |" in text
    assert "1 of 2 go on (c). Ranking: c 2, a ." in text
    assert [row["last"] for row in results.records(table)] == [2.2, 2.5, 2.7, "nan"]
    best = results.table(made(tmp_path), found_outcomes(), goal="max")
    assert [result.entry.name for result in best.results][:3] == ["b", "a", "c"]


def test_a_metric_that_no_run_reports_is_one_line_with_a_member(tmp_path):
    with pytest.raises(
        UsageError, match=r"--metric=eval/validation/lss is reported by no run; of the member a: did you"
    ):
        results.table(made(tmp_path), found_outcomes(), metric="eval/validation/lss")
    assert results.goal_of("eval/validation/accuracy") == "max" and results.goal_of("eval/x/reward/length") == "max"


def test_the_index_comes_back_as_it_was_written(tmp_path):
    one = made(tmp_path)
    one.add(Member("e", {"config.a": (1, 2), "config.b": None}), 7)
    one.change("a", state=FAILED, said="no", status=1)
    two = index.read(str(tmp_path))
    assert list(two) == list(one) and two.settings == one.settings and two.decisions == one.decisions


def test_the_index_of_format_1_is_read_for_ever():
    found = index.read(str(ROOT / "tests" / "specimens" / "sweep"))
    assert found.settings == Settings(
        ("--config=configs/pretrain/test.py", "--config.loop.steps=40"),
        "local",
        {"max_restarts": 1},
        metric=LOSS,
        goal="",
        halving=(2, 5),
    )
    assert [(entry.name, entry.state, entry.steps) for entry in found] == [
        ("lr-1e-3-size-1-2", "stopped", 40),
        ("lr-1e-2-size-1-2", "done", 40),
    ]
    assert found["lr-1e-2-size-1-2"].member.point == {RATE: 0.01, "config.size": (1, 2)}
    assert found.decisions[0].ranking[0] == ("lr-1e-2-size-1-2", 1.2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged: no JSON"),
        ("[]", "is no index of a sweep"),
        ('{"format": 2}', "has format 2, and this program reads up to 1"),
        ('{"format": 1}', "is damaged (KeyError"),
    ],
)
def test_an_index_that_cannot_be_read_is_one_line(tmp_path, content, message):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(UserError, match=re.escape(message)):
        index.read(str(tmp_path))
    with pytest.raises(UserError, match="holds no sweep"):
        index.read(str(tmp_path / "absent"))


def test_an_index_is_sorted_json_that_people_can_read(tmp_path):
    made(tmp_path).write()
    text = (tmp_path / "sweep.json").read_text()
    assert json.loads(text)["members"][0]["point"] == {RATE: 0.001, "config.seed": 0} and text.count("\n") > 50
