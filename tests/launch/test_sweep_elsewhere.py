"""A sweep on a cluster and in a bucket: what is handed over, when, and what is read back."""

import json
import re

import pytest

from launch import sweep
from launch.sweeps import elsewhere, index, outcomes, report
from launch.sweeps.index import DONE, RUNNING, SUBMITTED, WAITING
from launch.sweeps.members import JOB_LENGTH, job_name
from launch.sweeps.pool import OUTPUT, Pool, Task
from t5x_like.core.errors import UserError
from t5x_like.storage import paths
from tests.launch import quick_sweep, slurm_cluster, test_sweep
from tests.storage.fake_gcs import fake_gcs  # noqa: F401

NEW = ("--config=configs/pretrain/test.py", "--no_check", "--sweep.config.optim.learning_rate=1e-3,1e-2,1e-1")
GKE = ("--target=gke", "--topology=v5p:2x2x4", "--image=REGION-docker.pkg.dev/p/r/i:1", "--workdir=gs://bucket/rates")


@pytest.fixture
def cluster(monkeypatch):
    """Takes jobs, and runs none; the sweep looks at workdirs without a pause."""
    taken, rehearsed = [], []

    def launch(asked):
        assert not asked.check
        (rehearsed if asked.dry_run else taken).append(asked.job)
        return 0

    monkeypatch.setattr(elsewhere, "launcher", lambda target: launch)
    monkeypatch.setattr(elsewhere, "_POLL_SECONDS", 0.0)
    launch.taken, launch.rehearsed = taken, rehearsed
    return launch


def finish(folder, steps=40):
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "starts": [], "finished": {"step": steps}}))


def test_every_member_is_a_job_with_a_name_a_workdir_and_overrides_of_its_own(cluster, tmp_path, capsys):
    folder = tmp_path / "rates"
    start = ["--target=slurm", f"--workdir={folder}", "--nodes=2", *NEW]
    assert sweep.main([*start, "--dry_run"]) == 0
    assert not folder.exists() and len(cluster.taken) == 0
    assert sweep.main(start) == 0
    assert [job.name for job in cluster.taken] == ["rates-lr-1e-3", "rates-lr-1e-2", "rates-lr-0p1"]
    assert [job.name for job in cluster.rehearsed[-3:]] == [job.name for job in cluster.taken]
    job = cluster.taken[0]
    assert job.config == (NEW[0], "--config.optim.learning_rate=0.001") and job.slurm.nodes == 2
    assert job.workdir == str(folder / "lr-1e-3") and job.command == "train"
    assert "all 3 members are submitted" in capsys.readouterr().err
    # What was submitted is not submitted again, unless it is asked for.
    assert sweep.main([f"--workdir={folder}", "--resume", "--no_check"]) == 0 and len(cluster.taken) == 3
    assert sweep.main([f"--workdir={folder}", "--retry=lr-1e-2", "--no_check"]) == 0
    assert [job.name for job in cluster.taken[3:]] == ["rates-lr-1e-2"]


def test_so_many_members_are_submitted_as_others_have_finished(cluster, tmp_path, monkeypatch):
    folder, open_jobs = tmp_path / "rates", []

    def pause(seconds, asked):
        open_jobs.append(sum(entry.state == SUBMITTED for entry in index.read(str(folder))))
        finish(folder / next(e.name for e in index.read(str(folder)) if e.state == SUBMITTED))

    monkeypatch.setattr(elsewhere, "_sleep", pause)
    assert sweep.main(["--target=slurm", f"--workdir={folder}", "--max_parallel=1", *NEW]) == 0
    assert open_jobs == [1, 1]
    assert [entry.state for entry in index.read(str(folder))] == [DONE, DONE, SUBMITTED]


def test_a_job_that_cannot_be_submitted_is_named_and_the_rest_wait(cluster, tmp_path, monkeypatch, capsys):
    def refuse(asked):
        if not asked.dry_run and asked.job.name.endswith("1e-2"):
            raise UserError("sbatch ended with status 1")
        return 0

    folder = tmp_path / "rates"
    monkeypatch.setattr(elsewhere, "launcher", lambda target: refuse)
    assert sweep.main(["--target=slurm", f"--workdir={folder}", *NEW]) == 1
    assert "the member lr-1e-2 (config.optim.learning_rate=0.01): sbatch ended with status 1" in capsys.readouterr().err
    assert [entry.state for entry in index.read(str(folder))] == [SUBMITTED, WAITING, WAITING]


def test_a_sweep_on_gke_is_shown_without_a_network(capsys):
    assert sweep.main([*GKE, *NEW, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("kind: JobSet") == 1 and "name: rates-lr-1e-3\n" in shown
    assert shown.count("--workdir=gs://bucket/rates/lr-") == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((GKE[0], GKE[1], GKE[3]), "the member lr-1e-3 (config.optim.learning_rate=0.001): --image is missing"),
        ((*GKE[:3], "--workdir=absent/rates"), "rates/lr-1e-3 is a path of one machine"),
        ((*GKE, "--halving=2:5"), "--halving=2:5 is for --target=local"),
        (("--target=gek", GKE[3]), "--target=gek is unknown; did you mean 'gke'?"),
        ((*GKE, "--nodes=3"), "there is no flag --nodes"),
        (("--target=gcloud", *GKE[1:], "--zone=us-east5-a", "--follow"), "--follow stays with one run"),
    ],
)
def test_what_a_cluster_cannot_do_is_one_line_with_the_member(capsys, arguments, message):
    assert sweep.main([*arguments, *NEW, "--dry_run"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said


def test_job_names_have_room_for_the_suffixes_of_pods():
    names = {job_name(prefix, "a" * length, "gs://b/x") for prefix in ("r", "r" * 60) for length in (1, 20, 32)}
    assert len(names) == 6 and all(len(name) <= JOB_LENGTH and re.fullmatch(r"[a-z][a-z0-9-]*", name) for name in names)
    assert job_name("r" * 60, "a", "gs://b/x") != job_name("r" * 60, "a", "gs://b/y")


@pytest.mark.xdist_group("gcs")
def test_a_sweep_may_lie_in_a_bucket(fake_gcs, tmp_path):  # noqa: F811
    folder = f"{fake_gcs.bucket()}/rates"
    found = test_sweep.made(tmp_path)
    found.folder = folder
    found.change("b", state=RUNNING)
    assert list(index.read(folder)) == list(found)
    rows = [{"step": 10, "time": 1.0, test_sweep.LOSS: 2.0}, {"step": 20, "time": 2.0, test_sweep.LOSS: "NaN"}]
    paths.write_text_atomic(
        paths.join(found.workdir("a"), "metrics.jsonl"), "".join(f"{json.dumps(r)}\n" for r in rows)
    )
    paths.write_json_atomic(
        paths.join(found.workdir("a"), "manifest.json"), {"format": 1, "starts": [], "finished": {"step": 20}}
    )
    outcome = outcomes.read(found.workdir("a"))
    assert (outcome.finished, outcome.step, outcome.best(test_sweep.LOSS, "min")) == (20, 20, (2.0, 10))
    assert outcomes.read(found.workdir("c")) == outcomes.Outcome(None, 0, {})
    report.write(found)
    assert paths.read_text(f"{folder}/results.md").startswith("# rates\n")
    assert {"results.csv", "results.json", "sweep.json"} <= set(paths.list_names(folder))

    ended = []
    for count in (1, 2):  # the second start goes on in the same file
        with Pool(1) as pool:
            task = Task("a", ("python3", "-c", f"print('hello', {count})"), found.workdir("a"), {})
            pool.run([task], begins=lambda task: None, ends=lambda task, how: ended.append(how.said))
    assert ended == ["hello 1", "hello 2"]
    assert paths.read_text(paths.join(found.workdir("a"), OUTPUT)).count("\nhello ") == 2


@pytest.mark.xdist_group("slurm")
@pytest.mark.skipif(slurm_cluster.missing() is not None, reason=str(slurm_cluster.missing()))
def test_a_sweep_on_a_real_slurm(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "rates"
    few = ("--config=configs/pretrain/test.py", "--config.loop.steps=5", NEW[2])
    with slurm_cluster.cluster(tmp_path / "slurm") as slurm:
        for name in ("SLURM_CONF", "PATH"):
            monkeypatch.setenv(name, slurm.environment[name])
        monkeypatch.setattr(elsewhere, "_POLL_SECONDS", 0.2)
        place = ("--target=slurm", "--no-whole_nodes", "--max_parallel=2", f"--workdir={folder}")
        assert quick_sweep.main([*place, *few]) == 0
        slurm.until(lambda: all(outcomes.finished_step(str(folder / f"lr-{rate}")) for rate in ("1e-3", "1e-2", "0p1")))
    assert quick_sweep.main([f"--workdir={folder}", "--results"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("| 5/5 |") == 3 and shown.count("| done |") == 3
    assert [path.read_text().count("start ") for path in folder.glob("*/log.quick.txt")] == [1, 1, 1]
