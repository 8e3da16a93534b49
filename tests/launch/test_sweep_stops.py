"""A sweep that is asked to stop, whatever its members do at that moment; and what damage, retries and kills leave."""

import argparse
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from launch import check, flags, local, submission, sweep
from launch.job import Job
from launch.sweeps import elsewhere, halving, here, index, members, points, pool, reading, results
from launch.sweeps.index import DONE, FAILED, SAVED, STOPPED, SUBMITTED, WAITING, Entry, Index, Settings
from launch.sweeps.members import Member
from launch.sweeps.pool import Pool
from t5x_like.core.errors import UsageError, UserError
from tests.launch import quick_sweep

LOSS = "eval/validation/loss"
TEST = "--config=configs/pretrain/test.py"
DEAF = "import time; print('up', flush=True); time.sleep(30)"
SAVES = """
import signal, sys, time
def save(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as a run, which a second one ends unsaved
    time.sleep(0.4)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print('up', flush=True)
time.sleep(30)
"""


@dataclasses.dataclass
class Stand:
    """A job that runs a piece of Python."""

    code: str
    workdir: str
    config: tuple[str, ...] = ()
    environment: dict = dataclasses.field(default_factory=dict)

    @property
    def arguments(self):
        return ("-c", self.code)


def made(folder, *entries, **settings):
    given = [
        Entry(Member(each.pop("name"), {"config.seed": n}), **{"steps": 8, **each}) for n, each in enumerate(entries)
    ]
    return Index(str(folder), Settings((TEST,), "local", {}, **settings), given, [])


def runs(found, code="", say=lambda line: None, **codes):
    jobs = {name: Stand(codes.get(name, code), found.workdir(name)) for name in found.names}
    return here.Here(found, jobs, dict.fromkeys(found.names, 8), 0, say)


def states(found):
    return [(entry.name, entry.state, entry.said) for entry in index.read(found.folder)]


def sends(found, *numbers):
    """Sends signals to this process, the first when all members are up."""

    def when_up():
        for name in found.names:
            path = f"{found.workdir(name)}/log.output.txt"
            while not (os.path.exists(path) and "\nup\n" in pathlib.Path(path).read_text()):
                threading.Event().wait(0.01)
        for number in numbers:
            os.kill(os.getpid(), number)
            threading.Event().wait(0.1)

    threading.Thread(target=when_up, daemon=True).start()


@pytest.mark.parametrize(
    ("code", "numbers"),
    [
        (DEAF, [signal.SIGTERM]),  # as a member that imports jax
        (DEAF.replace("import time", "import signal, time; signal.signal(15, signal.SIG_IGN)"), [signal.SIGTERM] * 2),
        (SAVES, [signal.SIGUSR1, signal.SIGTERM]),  # as Slurm sends them
        (SAVES, [signal.SIGHUP, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM]),
    ],
)
def test_members_that_are_asked_to_stop_have_not_failed(tmp_path, code, numbers):
    found = made(tmp_path, {"name": "a"}, {"name": "b"})
    sends(found, *numbers)
    with Pool(2) as stage:
        runs(found, code).run(stage)
        assert stage.asked
    assert states(found) == [("a", SAVED, ""), ("b", SAVED, "")]
    if code == SAVES:
        assert [entry.status for entry in found] == [75, 75], "nobody is ended in the middle of a save"


def test_a_signal_that_comes_while_a_member_is_made_reaches_it(tmp_path, monkeypatch):
    popen = subprocess.Popen

    def slow(*arguments, **options):
        child = popen(*arguments, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        return child

    found = made(tmp_path, {"name": "a"})
    monkeypatch.setattr(pool.subprocess, "Popen", slow)
    with Pool(1) as stage:
        runs(found, DEAF).run(stage)
    assert states(found) == [("a", SAVED, "")] and found["a"].seconds < 10


def test_processes_of_one_run_are_warned_once(monkeypatch):
    handlers, sent = {}, []
    child = argparse.Namespace(poll=lambda: None, send_signal=sent.append)
    monkeypatch.setattr(local.signal, "signal", handlers.__setitem__)
    local._forward_signals([child])
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        handlers[number](number, None)
    assert sent == [signal.SIGTERM, signal.SIGKILL]


def test_a_terminal_that_is_gone_ends_no_sweep():
    code = "from launch import sweep; sweep.say('a'); sweep.say('b'); sweep._tell('c', __import__('sys').stdout)"
    reader, writer = os.pipe()
    os.close(reader)
    assert subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=writer).returncode == 0
    os.close(writer)


def test_one_damaged_member_ends_no_other(tmp_path):
    found = made(tmp_path, {"name": "a"}, {"name": "b"}, {"name": "c"})
    os.makedirs(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").write_text('{"format": 1, "starts": [], "finished": {"at": 1}}')
    damage = f"open({str(tmp_path / 'a' / 'metrics.jsonl')!r}, 'w').write('no row\\n')"
    with Pool(1) as stage:
        runs(found, a=damage, b="print('b')").run(stage)
    assert [entry.state for entry in found] == [FAILED, DONE, FAILED]
    assert "metrics.jsonl:1 is not a row" in found["a"].said and "without a step" in found["c"].said
    assert "- a: " in results.markdown(results.table(found, results.outcomes_of(found)), "rates")
    assert not elsewhere._is_done(found, found["c"])


def test_a_member_that_cannot_be_started_ends_no_other(tmp_path):
    found = made(tmp_path, {"name": "a"}, {"name": "b"})
    (tmp_path / "a").write_text("a file where its folder should be")
    with Pool(1) as stage:
        runs(found, "print('b')").run(stage)
    assert [entry.state for entry in found] == [FAILED, DONE] and "cannot be started" in found["a"].said


def judged(folder, name, **losses):
    os.makedirs(folder / name, exist_ok=True)
    rows = [{"step": int(step[1:]), "time": 1.0, LOSS: loss} for step, loss in losses.items()]
    (folder / name / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_a_retried_member_is_compared_with_the_others(tmp_path):
    said = []
    found = made(tmp_path, {"name": "a", "state": FAILED}, {"name": "b"}, halving=(2, 2))
    stage_runs = runs(found, "print(1)", said.append)
    with Pool(1) as stage:
        stage_runs.retry(["a"], stage)
        assert found["a"].state == SAVED
        assert said[0].startswith("a starts, to step 2")
    judged(tmp_path, "a", s2=1.0)
    judged(tmp_path, "b", s2=2.0)
    found.change("a", state=DONE)
    stage_runs._decide(["a", "b"], 2, 2)
    assert said[-1] == f"after 2 steps, by {LOSS}: a goes on; b stops (best 1, worst 2)"
    assert [entry.state for entry in index.read(str(tmp_path))] == [DONE, STOPPED]
    # One that is out of the race and was asked for again comes to its end, also after an interruption.
    found.change("b", state=SAVED)
    with Pool(1) as stage:
        stage_runs.run(stage)
    assert found["b"].state == DONE and said[-2].startswith("b starts (")


def test_a_member_that_finished_is_done_whatever_the_index_says(tmp_path):
    found = made(tmp_path, {"name": "a", "state": SAVED, "status": 75, "said": "x"})
    os.makedirs(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").write_text('{"format": 1, "starts": [], "finished": {"step": 8}}')
    with Pool(1) as stage:
        runs(found).run(stage)
    assert states(found) == [("a", DONE, "")] and found["a"].status is None


@pytest.fixture
def quick(monkeypatch, capfd):
    """(exit status, what it said) of a sweep of stand-ins."""

    def call(folder, *arguments, fails=""):
        monkeypatch.setenv("QUICK_FAIL", fails)
        capfd.readouterr()
        status = quick_sweep.main([f"--workdir={folder}", *arguments])
        return status, "".join(capfd.readouterr())

    return call


def test_members_that_all_fail_at_a_rung_are_named(quick, tmp_path):
    folder = tmp_path / "rates"
    few = (TEST, "--config.loop.steps=4", "--sweep.seeds=2", "--halving=2:2", "--max_parallel=2")
    status, told = quick(folder, *few, fails="seed-0:wrong,seed-1:wrong")
    assert status == 1 and "seed-1 failed: t5x_like: config.optim" in told and "no member has a finite" in told
    assert (folder / "results.md").exists()
    # Flags about this machine are kept.
    assert index.read(str(folder)).settings.max_parallel == 2


def waiting(folder, target="local", **launch):
    os.makedirs(folder)
    entries = [Entry(Member(f"seed-{seed}", {"config.seed": seed})) for seed in range(3)]
    Index(str(folder), Settings((TEST,), target, launch), entries, []).write()


def test_a_retry_of_what_failed_starts_nothing_else(quick, tmp_path, monkeypatch, capfd):
    waiting(tmp_path / "one")
    status, told = quick(tmp_path / "one", "--retry=failed")
    assert status == 0 and "no member has failed" in told
    assert [entry.starts for entry in index.read(str(tmp_path / "one"))] == [0, 0, 0]

    def launch(asked):
        print("# stop and delete; all save: kubectl delete jobset x")
        return 0

    waiting(tmp_path / "two", target="slurm")
    monkeypatch.setattr(elsewhere, "launcher", lambda target: launch)
    assert sweep.main([f"--workdir={tmp_path / 'two'}", "--retry=seed-1", "--no_check"]) == 0
    assert [entry.state for entry in index.read(str(tmp_path / "two"))] == [WAITING, SUBMITTED, WAITING]
    assert "seed-1: where its last job is still there, end it first: kubectl delete jobset x" in capfd.readouterr().err


def test_an_index_that_another_sweep_has_changed_meanwhile_is_not_written_over(quick, tmp_path, monkeypatch):
    folder = tmp_path / "rates"
    waiting(folder)
    settle = sweep.checks.settle

    def meanwhile(found):
        index.read(str(folder)).change("seed-2", state=DONE, said="of another sweep")
        return settle(found)

    monkeypatch.setattr(sweep.checks, "settle", meanwhile)
    status, told = quick(folder, "--resume")
    assert status == 1 and "has changed meanwhile" in told
    assert index.read(str(folder))["seed-2"].said == "of another sweep"


def test_a_kill_in_the_first_write_of_an_index_blocks_no_folder(tmp_path):
    (tmp_path / "sweep.json.tmp.host.77").write_text("{")
    sweep._check_empty(str(tmp_path))


def test_a_tool_hears_no_ctrl_c(monkeypatch):
    given = {}

    def run(command, **options):
        given.update(options)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(submission.subprocess, "run", run)
    submission._run(submission.Step(("true",)))
    assert given["start_new_session"]


def test_members_are_checked_where_they_will_run(tmp_path, monkeypatch):
    job = flags.describe([TEST], {"workdir": "/tmp/x", "nodes": 2, "gpus_per_node": 8, "name": "x"}, target="slurm")
    job = dataclasses.replace(job, topology="v5p:4x4x4")
    assert check.place_of(job, target="slurm") == check.Place(16, there=False)
    assert check.place_of(job) == check.Place(64, 1, there=False)
    seen = []

    def answer(runs, place, environment):
        seen.append(dict(environment))
        return [check.Verdict("", 40, ("loss",), {"seed": n, "data": {}}) for n, _ in enumerate(runs)]

    monkeypatch.setattr(check, "check", answer)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    found = made(tmp_path, {"name": "a"}, {"name": "b"}, gpus_each=1)
    jobs = {name: Job(name=name, command="train", config=(TEST,), workdir=found.workdir(name)) for name in "ab"}
    sweep.checks.check_members(found, jobs)
    assert seen == [{"CUDA_VISIBLE_DEVICES": "4"}]


def test_a_defect_in_the_check_is_a_line_of_its_member(tmp_path):
    path = tmp_path / "config.py"
    path.write_text("def get_config():\n    raise ValueError('on purpose')\n")
    assert (
        check._told(ValueError("two\nlines")) == "ValueError: two" and check._told(UserError("as it is")) == "as it is"
    )


def test_which_is_better():
    assert results.goal_of("eval/validation/teacher_agreement") == results.goal_of("train/margin") == "max"
    found = made("x", {"name": "a"})
    curves = {"train/loss": ([1], [0.0]), "train/reward": ([1], [0.5])}
    assert results.metric_of(found, {"a": results.Outcome(None, 1, curves)}, "") == "train/reward"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["config.a=1,2", "points=4"], "--sweep.points=4 has no effect"),
        (["config.a=1,2", "draw=sobol"], "--sweep.draw=sobol has no effect"),
        (["config.a=1,2", "combine=zip"], "--sweep.combine=zip has no effect"),
        (["config.a=uniform(0, 1)", "points=4", "points=5"], "points is given twice"),
        (["config.a=uniform(0, 1)", "points=\u00b2"], "should be a whole number"),
        (["config.a=uniform(0, 1)", f"points={'9' * 5000}"], "should be a whole number"),
    ],
)
def test_a_flag_without_effect_is_refused(given, message):
    with pytest.raises(UsageError, match=message):
        reading.read([TEST], [f"--sweep.{each}" for each in given])


def test_a_share_of_other_digits_is_refused():
    with pytest.raises(UsageError, match="should be SHARE:STEPS"):
        halving.parse("2:\u00b2")


def test_quotes_protect_commas_and_apostrophes_do_not():
    assert reading._items("'a, b', c") == ["a, b", "c"] and reading._items("it's, b's") == ["it's", "b's"]


def test_drawn_numbers_stay_in_their_range_and_names_differ(monkeypatch):
    assert points.uniform(0.12344, 1)(0.0) == 0.12344 and points.log_uniform(1.00004, 2)(0.0) == 1.00004
    point = {"config.text": "a" * 40}
    name = members._name(point, set())
    assert members._name(point, {name}) not in (name, "")


@pytest.mark.parametrize(
    "folder,others,message",
    [
        ("---", [], "the folder name --- cannot begin the names of jobs; give --name"),
        ("rates", ["--name=8b"], "--name=8b cannot begin the names of jobs; give --name"),
    ],
)
def test_what_cannot_begin_a_name_is_told_as_such(capsys, tmp_path, folder, others, message):
    arguments = ["--target=slurm", f"--workdir={tmp_path / folder}", TEST, "--sweep.seeds=2", "--dry_run", "--no_check"]
    assert sweep.main([*arguments, *others]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_begins_with_a_digit_gives_names_all_the_same(capsys, tmp_path):
    arguments = ["--target=slurm", f"--workdir={tmp_path / '8b'}", TEST, "--sweep.seeds=2", "--dry_run", "--no_check"]
    assert sweep.main(arguments) == 0
    assert "--job-name=run-8b-seed-0" in capsys.readouterr().out
