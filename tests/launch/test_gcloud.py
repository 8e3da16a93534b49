"""launch/gcloud.py: its commands as gcloud itself reads them, and the startup script run by bash with tools of ours."""

import os
import pathlib
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

import pytest

from launch import gcloud
from launch.flags import describe
from launch.gcloud import main
from launch.job import Job
from launch.submission import Submission
from tests.launch.jobs import CONFIG, GOLDEN, UPDATE, USUAL

ZONE = {"zone": "us-east5-a", "project": "project"}


def job(**values) -> Job:
    return describe([CONFIG], USUAL | ZONE | values, target="gcloud")


# One of each kind of command line.
JOBS = {
    "one slice": job(topology="v6e:4x4", spot=True),
    "two slices": job(topology="v5p:4x4x4", slices=2, valid_until="6h", network="mtu9k", subnetwork="s"),
    "a shape of two": job(topology="v5p:4x8x8", service_account="a@b.iam.gserviceaccount.com"),
    "reserved": job(topology="v4:2x2x4", reservation="projects/p/reservations/r"),
    "at once": job(topology="v5e:4x4", queued=False, spot=True),
    "one chip": job(topology="v6e:1x1", runtime="v2-alpha-tpuv6e"),
}


def commands(of: Job) -> list[tuple[str, ...]]:
    submission = gcloud.plan(of)
    return [*(step.command for step in submission.steps), *submission.afterwards.values()]


def test_the_whole_submission():
    of = job(topology="v5p:4x4x4", slices=2, spot=True, environment={"NAME": "it's"}, max_restarts=3, grace_seconds=25)
    submission = gcloud.plan(of)
    text = "".join(f"# {' '.join(command)}\n" for command in commands(of)) + submission.steps[0].document
    if UPDATE:
        (GOLDEN / "gcloud.sh").write_text(text)
    assert text == (GOLDEN / "gcloud.sh").read_text()


def test_each_way_to_ask_has_its_flags():
    created = {name: set(gcloud.create(each)) for name, each in JOBS.items()}
    assert {"--accelerator-type=v6e-16", "--node-id=llama", "--spot"} <= created["one slice"]
    assert {"--node-count=2", "--node-prefix=llama", "--valid-until-duration=6h"} <= created["two slices"]
    assert {"alpha", "--type=v5p", "--topology=4x8x8"} <= created["a shape of two"]
    assert {"alpha", "--reserved", "--reservation=projects/p/reservations/r"} <= created["reserved"]
    assert {"tpu-vm", "--version=v2-alpha-tpuv5-lite"} <= created["at once"] and "alpha" not in created["at once"]
    assert gcloud.log(JOBS["two slices"])[5] == "llama-0" and gcloud.log(JOBS["one slice"])[5] == "llama"


def said(folder: pathlib.Path, commands: Sequence[tuple[str, ...]]) -> list[str]:
    """What gcloud says of commands. It has no account here, and says so once it has taken all flags."""
    if not shutil.which("gcloud"):
        pytest.skip("gcloud is not installed: its commands are compared with a golden file alone")
    environment = os.environ | {"CLOUDSDK_CONFIG": str(folder), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
    how: dict[str, Any] = {"env": environment, "stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, stdout=subprocess.DEVNULL, **how) for command in commands]
    return [child.communicate(timeout=120)[1] for child in running]


TAKEN = "You do not currently have an active account"


def test_gcloud_takes_the_command_that_asks_for_tpus(tmp_path):
    right = gcloud.create(JOBS["two slices"])
    misspelt, taken = said(tmp_path, [(*right, "--spots"), right])
    assert "unrecognized arguments: --spots" in misspelt and TAKEN in taken


@pytest.mark.slow
def test_gcloud_takes_every_command(tmp_path):
    every = list(dict.fromkeys(command for each in JOBS.values() for command in commands(each)))
    answers = dict(zip(every, said(tmp_path, every), strict=True))
    assert {command: answer for command, answer in answers.items() if TAKEN not in answer} == {}


TOOLS = {
    # The status of each start in turn.
    "docker": """
        echo "docker $*" >> calls
        [ "$1" = run ] || exit 0
        read -r status rest < statuses; echo "$rest" > statuses; exit "$status" """,
    # Fails once for each line of the file failures.
    "gcloud": """
        echo "gcloud $*" >> calls
        [ -s failures ] || exit 0
        sed -i 1d failures; exit 1 """,
    "sleep": 'echo "sleep $*" >> calls',
    "curl": """
        case "${@: -1}" in
          */instance/zone) echo projects/77/zones/us-east5-a ;;
          */project/project-id) echo project ;;
          *) exit 22 ;;
        esac""",
}


def boot(folder: pathlib.Path, of: Job, statuses: str) -> tuple[list[str], str]:
    """The calls of tools, and the log, of a machine that runs the startup script."""
    tools = folder / "tools"
    tools.mkdir(parents=True)
    for name, text in TOOLS.items():
        (tools / name).write_text(f"#!/bin/bash\ncd {folder}\n{text}\n")
        (tools / name).chmod(0o755)
    (folder / "statuses").write_text(statuses)
    script = gcloud.startup_script(of, folder=str(folder))
    environment = {"PATH": f"{tools}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", script], env=environment, cwd=folder, check=True, timeout=20)
    return (folder / "calls").read_text().splitlines(), pathlib.Path(gcloud.log_file(of, str(folder))).read_text()


DELETED = "gcloud compute tpus queued-resources delete llama --force --zone=us-east5-a --project=project --quiet"


def test_a_machine_starts_the_run_until_it_is_done_and_deletes_the_tpus(tmp_path):
    calls, log = boot(tmp_path / "a", job(environment={"NAME": "it's"}), "75 1 75 0 9")
    runs = [call for call in calls if call.startswith("docker run")]
    assert len(runs) == 4 and len(set(runs)) == 1
    assert "--env=NAME=it's" in runs[0] and runs[0].endswith("train " + CONFIG + " --workdir=gs://bucket/runs/llama")
    assert calls[0] == "gcloud auth configure-docker us-docker.pkg.dev --quiet"
    assert calls[-1] == DELETED
    assert [call for call in calls if call.startswith("sleep")] == ["sleep 15", "sleep 60", "sleep 15", "sleep 120"]
    assert "launch: done" in log and "after 1 faults since the boot" in log


def test_tpus_are_deleted_once_the_network_is_back(tmp_path):
    (tmp_path / "failures").write_text("docker's credentials\nno network\nno network\n")
    calls, log = boot(tmp_path, job(), "0")
    assert [call for call in calls if "delete" in call] == [DELETED] * 3 and calls[-2:] == ["sleep 60", DELETED]
    assert log.count("the TPUs are not deleted and cost on; tries again in 60 s") == 2


@pytest.mark.parametrize(
    ("statuses", "starts", "end"),
    [("2 0", 1, "wrong use"), ("1 75 137 125 0", 4, "status 125, fault 3; no restart is left of 2")],
)
def test_what_no_restart_helps_ends(tmp_path, statuses, starts, end):
    calls, log = boot(tmp_path / "a", job(max_restarts=2), statuses)
    assert sum(call.startswith("docker run") for call in calls) == starts
    assert end in log and calls[-1] == DELETED
    kept, _ = boot(tmp_path / "b", job(max_restarts=2, keep=True), statuses)
    assert not [call for call in kept if "delete" in call]


HICCUP = gcloud.UserError("503")


def followed(monkeypatch, states: Sequence[Any], failures: Sequence[int] = ()) -> list[str]:
    """The verbs of --follow while TPUs are in these states in turn; which of its commands fail."""
    answers, verbs = iter(states), []
    of = JOBS["one slice"]

    def state(_: Job) -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def submit(submission: Submission, *, dry_run: bool) -> int:
        assert not dry_run
        for step in submission.steps:
            verbs.append("create" if step.command == gcloud.create(of) else "delete")
            assert step.command == (gcloud.create(of) if verbs[-1] == "create" else gcloud.delete(of))
            if len(verbs) - 1 in failures:
                raise HICCUP
        return 0

    monkeypatch.setattr(gcloud, "submit", submit)
    gcloud.follow(of, gcloud.plan(of), state, lambda seconds: None)
    return verbs


@pytest.mark.parametrize(
    ("states", "failures", "verbs"),
    [
        (["gone", "PROVISIONING", "ACTIVE", "gone"], (), ["create"]),
        (["ACTIVE", "DELETING", "gone"], (), []),  # started again: it is there already
        (["DELETING", "gone", "ACTIVE", "gone"], (), ["create"]),  # of the run before
        (["gone", "ACTIVE", "SUSPENDED", "gone", "ACTIVE", "gone"], (), ["create", "delete", "create"]),
        (["SUSPENDED", "DELETING", "gone", "ACTIVE", "gone"], (), ["delete", "create"]),
        (["ACTIVE", *[HICCUP] * 59, "ACTIVE", *[HICCUP] * 59, "gone"], (), []),
        (
            ["ACTIVE", "SUSPENDED", "SUSPENDED", "gone", "gone", "ACTIVE", "gone"],
            (0, 2),
            ["delete"] * 2 + ["create"] * 2,
        ),
    ],
)
def test_tpus_are_asked_for_when_they_are_not_there_or_were_taken_away(monkeypatch, states, failures, verbs):
    assert followed(monkeypatch, states, failures) == verbs


@pytest.mark.parametrize(
    ("states", "failures", "says"),
    [
        ([HICCUP], (), "503"),
        (["gone"], (0,), "503"),
        (["ACTIVE", *[HICCUP] * 60], (), "503"),
        (["gone", "WAITING_FOR_RESOURCES", "FAILED"], (), "llama is FAILED, .* describe llama .* delete llama"),
    ],
)
def test_what_no_waiting_helps_ends_the_following(monkeypatch, states, failures, says):
    with pytest.raises(gcloud.UserError, match=says):
        followed(monkeypatch, states, failures)


def test_the_state_is_what_gcloud_says(tmp_path, monkeypatch):
    answers = {"ACTIVE": "echo ACTIVE", "gone": 'echo "NOT_FOUND: no such" >&2; exit 1'}
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for state, text in answers.items():
        (tmp_path / "gcloud").write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "gcloud").chmod(0o755)
        assert gcloud.state_of(JOBS["one slice"]) == state
    (tmp_path / "gcloud").write_text("#!/bin/bash\necho 'no network' >&2; exit 1\n")
    with pytest.raises(gcloud.UserError, match="no network; llama itself goes on"):
        gcloud.state_of(JOBS["one slice"])


def test_a_dry_run_prints_all_and_runs_nothing(capsys):
    flags = [f"--{name}={value}" for name, value in (USUAL | ZONE).items()]
    assert main([CONFIG, *flags, "--spot", "--dry_run", "--no_check"]) == 0
    text = capsys.readouterr().out
    assert "docker run --name=llama" in text and "nothing was submitted" in text
    assert main([CONFIG, *flags, "--spot", "--follow", "--dry_run", "--no_check"]) == 0
    assert "this command stays until the run has ended" in capsys.readouterr().out
    assert "--follow asks for new ones" in text and "$ gcloud compute tpus queued-resources create llama" in text


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("--topology=tpu7x:2x2x1", "tpu7x is on GKE alone; use launch.gke"),
        ("--topology=v5p:3x3x3", "no slice of v5p"),
        ("--image=registry/t5x_like", "has no tag"),
        ("--image=", "--image is missing"),
        ("--workdir=runs/tiny", "is a path of one machine"),
        ("--zone=", "--zone is missing"),
        ("--zone=us-east5", "should be a zone, not a region"),
        ("--no-queued --slices=2", "--slices=2 needs a queued resource"),
        ("--no-queued --reservation=r", "--reservation=r needs a queued resource"),
        ("--spot --reservation=r", "exclude each other"),
        ("--zone=a-b-c-d", "--zone=a-b-c-d should be a zone such as us-east5-a"),
        ("--reservation=-a", "--reservation=-a should be NAME or projects/PROJECT/reservations/NAME"),
        ("--keep --follow", "--keep and --follow exclude each other"),
        ("--service_account=trainer", "should be the e-mail of a service account"),
        ("--valid_until=soon", "should be like 90m, 6h or 2d"),
        ("--valid_until=0s", "should be like 90m, 6h or 2d"),
        (f"--slices=12 --name={'a' * 61}", "has 64 characters with the number of a slice"),
    ],
)
def test_bad_input_is_one_line(capsys, change, line):
    flags = [f"--{name}={value}" for name, value in (USUAL | ZONE).items()]
    assert main([CONFIG, *flags, "--dry_run", "--no_check", *change.split(" ")]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
