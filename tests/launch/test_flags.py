"""One description of a run: usual values, then the config file's get_launch(), then flags; every fault is one line."""

import dataclasses
import os
import subprocess
import sys

import pytest

from launch import flags
from launch import job as jobs_of
from launch.job import Job
from t5x_like.core import config as bridge
from t5x_like.core.errors import UsageError
from tests.launch import jobs

CONFIG = """
from t5x_like.configs import common

def get_config():
    return common.config()

def get_launch():
    return {launch}
"""


@pytest.fixture
def config(tmp_path):
    """A config file with a get_launch() that returns what it is given."""

    def write(launch):
        path = tmp_path / "config.py"
        path.write_text(CONFIG.format(launch=launch))
        return f"--config={path}"

    return write


def read(*arguments, target="gke"):
    return flags.read(arguments, target=target)


def test_flags_come_before_the_file_and_the_file_before_usual_values(config):
    file = config({"topology": "v6e:4x4", "spot": True, "gke": {"queue": "mine"}, "environment": {"A": "1", "B": "2"}})
    job = read(file, "--workdir=gs://bucket/A_run/", "--topology=v6e:4x8", "--environment=B=3", "--environment=C=4").job
    assert (job.topology, job.spot, job.gke.queue, job.slices) == ("v6e:4x8", True, "mine", 1)
    assert job.environment == {"A": "1", "B": "3", "C": "4"}
    assert job.name == "a-run"
    assert read(file, "--workdir=w", "--no-spot", "--queue=other").job.gke.queue == "other"
    assert read(file, "--workdir=w", "--no-spot").job.spot is False


def test_what_follows_config_goes_to_the_run_unchanged(config):
    given = [config({}), "--config.loop.steps=7", "--config.data.source=jsonl:a b/*.jsonl"]
    asked = read(*given, "--workdir=w", "--dry_run")
    assert asked.job.arguments == ("-m", "t5x_like", "train", *given, "--workdir=w")
    assert (asked.dry_run, asked.check) == (True, True)
    assert read(jobs.CONFIG, "--workdir=w", "--no_check").check is False


def test_a_config_of_reinforcement_learning_runs_by_its_own_command():
    assert read("--config=configs/rl/reverse.py", "--workdir=w").job.command == "rl"
    assert read("--config=tiny", "--workdir=w").job.command == "train"


@pytest.mark.parametrize(
    ("launch", "says"),
    [
        ({"topologie": "v5p:4x4x4"}, "get_launch().topologie is unknown; did you mean 'topology'?"),
        ({"gke": {"que": "a"}}, "get_launch().gke.que is unknown; did you mean 'queue'?"),
        ({"slices": "2"}, "get_launch().slices='2' should be a whole number, not str"),
        ({"gke": 3}, "get_launch().gke=3 should be a section"),
        ({"gke": None}, "get_launch().gke=None should be a section"),
        ({"environment": None}, "get_launch().environment=None should be a section"),
        ({1: 2}, "get_launch() has the key 1"),
        ({"gke": {1: 2}}, "get_launch().gke has the key 1"),
        ([], "get_launch() should return a dict, not list"),
        ({"topology": "v5p:3x3x3"}, "--topology=v5p:3x3x3 is no slice of v5p"),
    ],
)
def test_a_wrong_get_launch_is_one_line(config, launch, says):
    with pytest.raises(UsageError) as error:
        read(config(launch), "--workdir=w", "--queue=q", "--environment=A=1")
    assert says in str(error.value) and "\n" not in str(error.value)


def test_an_error_inside_get_launch_names_file_and_line(config):
    with pytest.raises(UsageError, match=r"config.py:8: ZeroDivisionError: division by zero"):
        read(config("1 / 0"), "--workdir=w")


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--topologie=v5p:4x4x4", "there is no flag --topologie; did you mean '--topology'?"),
        ("--partition=debug", "there is no flag --partition"),
        ("--slices=two", "argument --slices: invalid int value: 'two'"),
        ("--slices=0", "--slices=0 should be at least 1"),
        ("--slices=1025", "--slices=1025 should be at most 1024"),
        ("--max_restarts=2147483648", "should be at most 2147483647"),
        ("--topology=v5p:" + "9" * 5000, "give the chips along each dimension"),
        ("--topology=v5p:\u0664x4x4", "give the chips along each dimension"),
        ("--zone=Mars", "--zone=Mars should be a zone such as us-east5-a"),
        ("--workdir=gs://b/a\nb", "--workdir='gs://b/a\\nb' has characters that cannot be printed"),
        ("--workdir=gs://b/---", "--workdir=gs://b/--- gives no name for the job; give --name"),
        ("--workdir=gs://b/\u0416", "gives no name for the job; give --name"),
        ("--queue=" + "a" * 64, "in at most 63 characters"),
        ("--slices=2", "--slices=2 needs --topology"),
        ("--topology=v5p-512", "v5p-512 has several shapes; write v5p:4x4x16 or v5p:4x8x8"),
        ("--topology=h100:8", "'h100' is unknown"),
        ("--image=a/b", "--image=a/b has no tag; give IMAGE:TAG"),
        ("--image=a/b:", "has no tag"),
        ("--image=a/b:x y", "'x y' is no tag"),
        ("--name=A_b", "--name=A_b should be of a-z, 0-9 and -"),
        ("--name=" + "a" * 64, "in at most 63 characters"),
        ("--environment=A", "--environment=A should be --environment=NAME=VALUE"),
        ("--environment=A-B=1", "A-B=... is no name of a variable"),
        ("--environment=JAX_PROCESS_ID=1", "is set by the launcher; leave it out"),
        ("--environment=MEGASCALE_SLICE_ID=1", "is set by the launcher; leave it out"),
        ("--max_restarts=-1", "--max_restarts=-1 should not be negative"),
        ("--grace_seconds=0", "--grace_seconds=0 should be at least 1"),
        ("--keep_seconds=-1", "--keep_seconds=-1 should not be negative"),
        ("--queue=Mine", "--queue=Mine should be of a-z, 0-9 and -"),
    ],
)
def test_a_wrong_flag_is_one_line(flag, says):
    with pytest.raises(UsageError) as error:
        read(jobs.CONFIG, "--workdir=gs://bucket/run", flag)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_spot_and_reservation_exclude_each_other():
    with pytest.raises(UsageError, match="--spot and --reservation=r exclude each other"):
        read(jobs.CONFIG, "--workdir=w", "--spot", "--reservation=r")


def test_a_missing_workdir_is_named():
    with pytest.raises(UsageError, match="--workdir is missing"):
        read(jobs.CONFIG)


@pytest.mark.parametrize(
    ("workdir", "name"),
    [
        ("runs/8b", "run-8b"),
        ("gs://b/2026-11-27/", "run-2026-11-27"),
        ("runs/\u00fc1", "run-1"),
        ("runs/" + "a" * 70, "a" * 63),
        ("runs/" + "1" * 58 + "_b", "run-" + "1" * 58),
        ("gs://b/..", ""),
    ],
)
def test_a_workdir_gives_a_name_that_every_target_takes(workdir, name):
    assert jobs_of.name_of(workdir) == name
    if name:
        assert read(jobs.CONFIG, f"--workdir={workdir}").job.name == name


DIGEST = "@sha256:" + "0" * 64


@pytest.mark.parametrize(
    "image",
    ["host:5000/a/b" + DIGEST, "host:5000/a/b:v1.2_3", "a/b:1" + DIGEST, "localhost/a:1", "python:3.11", "A.b/c__d:1"],
)
def test_an_image_with_a_tag_or_a_digest_is_one_for_good(image):
    jobs_of.check_image(image)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        *((image, "names no image") for image in (":1", "a/:1", "A/B:1", "A B:1", "a b/c:1", "-v/x:1", "http://a/b:1")),
        *((f"a/b{digest}", "is no digest") for digest in ("@sha256:", ":1@sha256:zz", "@", DIGEST + "0")),
        (DIGEST, "names no image"),
        ("a/b:1\n", "is no tag"),
    ],
)
def test_what_no_registry_takes_for_an_image_is_refused(image, says):
    with pytest.raises(UsageError, match=says):
        jobs_of.check_image(image)


def test_a_reader_that_leaves_ends_the_command():
    """As `launch.gke ... | true` does."""
    code = "import sys; from launch import gke; sys.exit(gke.main())"
    values = [f"--{name}={value}" for name, value in jobs.USUAL.items()]
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-c", code, jobs.CONFIG, *values, "--dry_run", "--no_check"]
    done = subprocess.run(command, cwd=jobs.ROOT, stdout=write_end, stderr=subprocess.PIPE)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("target", ["gke", "xpk", "slurm", "gcloud", "sky"])
def test_every_field_is_a_flag_once(target):
    """A field of a section with the name of one of Job's own would hide it."""
    names = {field.name for field in dataclasses.fields(Job)} - {"command", "config"}
    sections = {name for name in names if bridge.section_class(Job, name)}
    own = flags.usual().get(flags.section_of(target), {})
    assert not names & own.keys()
    given = flags.parser(target).format_help()
    assert [name for name in (names - sections) | own.keys() if f"--{name}" not in given] == []


def test_a_description_waits_for_no_array_library():
    code = (
        "import sys; from launch import gke; "
        "status = gke.main([*sys.argv[1:], '--dry_run', '--no_check']); "
        "assert status == 0 and 'jax' not in sys.modules and 'numpy' not in sys.modules, [*sys.modules]"
    )
    values = [f"--{name}={value}" for name, value in jobs.USUAL.items()]
    done = subprocess.run([sys.executable, "-c", code, jobs.CONFIG, *values], cwd=jobs.ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
