"""launch/slurm.py: the script that it makes, and what a real Slurm of two nodes does with it.

What stands for the run in most tests of the cluster is a small shell program; test_slurm_training.py trains.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from launch import slurm
from launch.flags import read
from launch.job import Job, Slurm, name_of
from launch.slurm import main
from t5x_like.core.errors import UsageError
from tests.launch.jobs import GOLDEN, UPDATE
from tests.launch.slurm_cluster import Cluster, cluster, missing

CONFIG = "--config=configs/pretrain/tiny.py"
DRY = ("--dry_run", "--no_check")


def job(**slurm_fields) -> Job:
    return Job("train", (CONFIG,), workdir="runs/tiny", name="tiny", slurm=Slurm(**slurm_fields))


def test_the_whole_script():
    asked = read(
        [CONFIG, "--config.loop.steps=100", "--workdir=runs/a b", "--name=tiny", "--nodes=2", "--gpus_per_node=8"]
        + ["--processes_per_node=8", "--time=4:00:00", "--partition=gpu", "--account=lm", "--reservation=night"]
        + ["--environment=NAME=it's", "--setup=module load cuda", "--batch_options=--qos=high --constraint='a|b'"]
        + ["--step_options=--container-image=registry/jax:25", "--max_restarts=3", "--grace_seconds=300"],
        target="slurm",
    )
    text = slurm.script(asked.job, python="python3", folder="/data/checkout")
    if UPDATE:
        (GOLDEN / "slurm.sh").write_text(text)
    assert text == (GOLDEN / "slurm.sh").read_text()


def test_bash_accepts_every_script():
    for each in (job(), job(nodes=4, gpus_per_node=8, setup="module load a\nmodule load b")):
        text = slurm.script(each, python="python3", folder="/data")
        assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""


def test_nodes_are_shared_where_the_user_says_so():
    whole, shared = job(), job(whole_nodes=False, batch_options="--cpus-per-task=4")
    assert {"--exclusive", "--mem=0"} <= set(slurm.batch_options(whole, "/d"))
    assert not {"--exclusive", "--mem=0"} & set(slurm.batch_options(shared, "/d"))
    assert main([CONFIG, "--workdir=runs/8b", "--no-whole_nodes", "--batch_options=--mem=4G", *DRY]) == 0
    assert "--cpus-per-task=4" in slurm.batch_options(shared, "/d")


def test_a_log_lies_beside_the_workdir():
    assert slurm.log_of(job(), "/data") == "/data/runs/tiny.log"
    assert slurm.log_of(Job("train", (), workdir="gs://b/tiny", name="tiny"), "/data") == "/data/tiny.log"


def test_a_dry_run_prints_the_script_and_how_to_watch_and_stop(capsys):
    assert main([CONFIG, "--workdir=runs/tiny", "--nodes=2", "--topology=v5p:2x2x2", "--dry_run", "--no_check"]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --nodes=2\n" in text and "--workdir=runs/tiny\n" in text and "$ sbatch < " in text
    assert "not used by Slurm: topology" in text
    assert "scancel --name=tiny" in text and "tail -F" in text


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--nodes=0", "--nodes=0 should be at least 1"),
        ("--gpus_per_node=8 --processes_per_node=3", "--gpus_per_node=8 cannot be shared by --processes_per_node=3"),
        ("--time=soon", "--time=soon should be like 4:00:00"),
        ("--time=3", "--time=3 leaves no time to train"),
        ("--batch_options=-p", "'-p' should begin with --"),
        ("--step_options='a", "no closing quotation"),
        ("--batch_options=--no-requeue", "the launcher sets --no-requeue itself; a run starts again by it"),
        ("--batch_options=--nodes=3", "the launcher sets --nodes itself; give it beside this one"),
        ("--batch_options=--mem=4G", "the launcher sets --mem itself; add --no-whole_nodes"),
        ("--setup=a --name=A", "--name=A should be of a-z"),
        ("--workdir=run\\s", "takes no option with a backslash"),
        ("--partition=a\nb", "--partition='a\\nb' has characters that cannot be printed"),
    ],
)
def test_bad_input_is_one_line(capsys, flags, line):
    assert main([CONFIG, "--workdir=runs/tiny", "--dry_run", "--no_check", *flags.split(" ")]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("10:30", 630),
        ("4:00:00", 14400),
        ("2-00", 172800),
        ("1-02:30", 95400),
        ("", None),
        ("1:2:3:4", None),
    ],
)
def test_limits_are_read_as_slurm_reads_them(time, seconds):
    assert Slurm(time=time).seconds == seconds


# On a real cluster.


@pytest.fixture(scope="module")
def slurm_cluster(tmp_path_factory):
    if reason := missing():
        pytest.skip(reason)
    with cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


class Submitted:
    """A job of launch/slurm.py whose interpreter is `run`, a text for bash."""

    def __init__(self, on: Cluster, folder: pathlib.Path, run: str, **fields) -> None:
        self.cluster, self.folder = on, folder
        folder.mkdir(exist_ok=True)
        program = folder / "run.sh"
        program.write_text(f"#!/bin/bash\ncd {folder}\n{run}")
        program.chmod(0o755)
        restarts = fields.pop("max_restarts", 10)
        each = Slurm(**{"whole_nodes": False, "python": str(program), **fields})
        # A name of its own: a second job of one name waits for the first.
        of = Job("train", (), str(folder / "run"), name_of(str(folder)), max_restarts=restarts, slurm=each)
        text = slurm.script(of, python="", folder=str(folder))
        self.number = on.submit(text)

    @property
    def log(self) -> str:
        path = self.folder / "run.log"
        return path.read_text() if path.exists() else ""


def test_statuses_decide_what_follows(slurm_cluster, tmp_path):
    # The status of each start in turn.
    run = """read -r status rest < statuses; echo "$rest" > statuses; echo "status $status"; exit "$status"\n"""
    cases = {"saved": "75 75 0", "faults": "1 75 137 1 0", "wrong": "2 0", "lucky": "1 0"}
    jobs = {}
    for name, statuses in cases.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "statuses").write_text(statuses)
        jobs[name] = Submitted(slurm_cluster, tmp_path / name, run, max_restarts=2)
    ends = {name: slurm_cluster.finish(each.number) for name, each in jobs.items()}
    assert {name: (end["JobState"], end["ExitCode"], end["Restarts"]) for name, end in ends.items()} == {
        "saved": ("COMPLETED", "0:0", "2"),
        "faults": ("FAILED", "1:0", "3"),  # the status 75 on the way is not counted
        "wrong": ("FAILED", "2:0", "0"),
        "lucky": ("COMPLETED", "0:0", "1"),
    }
    assert re.findall("status (75|0)$", jobs["saved"].log, re.M) == ["75", "75", "0"], "one log for all starts"
    assert "fault 3; no restart is left of 2" in jobs["faults"].log
    assert "wrong use, which no restart helps" in jobs["wrong"].log


# Waits for a signal, and saves for two seconds.
SAVES = """
trap 'told=$(date +%s); echo told' USR1 TERM
echo begun >> begun; [ "$(wc -l < begun)" -gt "$ENOUGH" ] && exit 0
while [ -z "$told" ]; do sleep 0.1; done
sleep 2 & wait $!; sleep 1
echo saved >> saved; exit 75
"""


def test_a_requeue_saves_and_goes_on_and_a_cancelled_job_does_not(slurm_cluster, tmp_path):
    on = slurm_cluster
    requeued = Submitted(on, tmp_path / "requeued", SAVES.replace("$ENOUGH", "2"), nodes=2)
    cancelled = Submitted(on, tmp_path / "cancelled", SAVES.replace("$ENOUGH", "9"), nodes=2)
    warned = Submitted(on, tmp_path / "warned", SAVES.replace("$ENOUGH", "2"), nodes=2)
    for each in (requeued, cancelled, warned):
        on.until(lambda each=each: len(lines(each.folder / "begun")) == 2)
    on.run("scontrol", "requeue", requeued.number)
    on.run("scancel", cancelled.number)
    on.run("scancel", "--signal=USR1", warned.number)  # as Slurm does before the time limit
    ends = [on.finish(each.number) for each in (requeued, cancelled, warned)]
    assert [(end["JobState"], end["Restarts"]) for end in ends] == [
        ("COMPLETED", "1"),
        ("CANCELLED", "0"),
        ("COMPLETED", "1"),
    ]
    for each in (requeued, cancelled, warned):
        assert lines(each.folder / "saved") == ["saved"] * 2, "both processes had the time to save"
    assert "stopped by Slurm" in requeued.log and "stopped by Slurm" in cancelled.log
    assert "status 75, saved; starts again" in warned.log


@pytest.mark.slow
def test_a_time_limit_is_warned_of_and_the_job_goes_on(slurm_cluster, tmp_path):
    # Slurm counts limits in minutes, and looks at them twice a minute.
    options = {"nodes": 2, "time": "2", "batch_options": "--signal=USR1@60"}
    of = Submitted(slurm_cluster, tmp_path / "limited", SAVES.replace("$ENOUGH", "2"), **options)
    end = slurm_cluster.finish(of.number, seconds=200)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1")
    assert lines(of.folder / "saved") == ["saved"] * 2
    assert "status 75, saved; starts again" in of.log


def lines(path: pathlib.Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_paths_with_odd_names_are_found(slurm_cluster, tmp_path):
    names = ["two  words", "it's", 'say "x"', "100%j", "a$b", "caf\u00e9", "a#b;c*"]
    jobs = [Submitted(slurm_cluster, tmp_path / name, "", python="/bin/echo") for name in names]
    for name, each in zip(names, jobs, strict=True):
        assert slurm_cluster.finish(each.number)["JobState"] == "COMPLETED"
        assert f"--workdir={tmp_path / name / 'run'}\n" in each.log, name


def test_a_submission_prints_the_job_and_its_name_cancels_it(slurm_cluster, tmp_path, monkeypatch, capfd):
    for name, value in slurm_cluster.environment.items():
        monkeypatch.setenv(name, value)
    flags = [f"--workdir={tmp_path}/deep/er/Run_1", "--no_check", "--no-whole_nodes", f"--python={sys.executable}"]
    assert main([CONFIG, *flags, "--partition=none"]) == 1
    assert "sbatch ended with status 1; nothing more was done" in capfd.readouterr().err
    assert main([CONFIG, *flags, "--batch_options=--begin=now+1hour"]) == 0
    text = capfd.readouterr().out
    number = re.search(r"Submitted batch job (\d+)", text)
    assert number and os.path.isdir(tmp_path / "deep" / "er")
    assert slurm_cluster.job(number[1])["JobName"] == "run-1"
    slurm_cluster.run("scancel", "--name=run-1")
    assert slurm_cluster.job(number[1])["JobState"] == "CANCELLED"


def test_a_second_job_of_one_name_waits_for_the_first(slurm_cluster, tmp_path):
    on = slurm_cluster
    run = "echo begun >> begun; while [ ! -e end ]; do sleep 0.1; done\n"
    first, second = (Submitted(on, tmp_path / "twice", run) for _ in range(2))
    on.until(lambda: lines(first.folder / "begun") == ["begun"])
    assert on.job(second.number)["JobState"] == "PENDING" and on.job(second.number)["Dependency"] != "(null)"
    (first.folder / "end").touch()
    assert [on.finish(each.number)["JobState"] for each in (first, second)] == ["COMPLETED"] * 2
    assert lines(first.folder / "begun") == ["begun"] * 2


def test_an_option_that_no_script_can_hold_is_refused():
    with pytest.raises(UsageError, match="no option with a backslash"):
        slurm.script(job(), python="python3", folder="/data\\x")
