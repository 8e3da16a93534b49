"""Two real processes write one checkpoint and agree about a damaged one, even if only one of them reads the damage."""

import os
import pathlib
import shutil
import socket
import subprocess
import sys

import pytest

from tests.storage.test_workdir import ROOT


def _run(count: int, directory: pathlib.Path, task: str) -> list[list[str]]:
    """The lines that each process says; they must all end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = [directory.with_name(f"said-{task}-{index}.txt") for index in range(count)]
    children = []
    for index in range(count):
        words = [port, str(index), str(count), str(directory), task, str(said[index])]
        command = [sys.executable, str(ROOT / "tests/storage/pair.py"), *words]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        children.append(subprocess.Popen(command, text=True, cwd=ROOT, env=environment, **pipes))
    try:
        results = [child.communicate(timeout=120) for child in children]
    finally:
        for child in children:
            child.kill()
    for child, (_, errors) in zip(children, results, strict=True):
        assert child.returncode == 0, errors
    return [file.read_text().splitlines() for file in said]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pair") / "checkpoints"
    assert _run(2, directory, "save") == [["saved True"], ["saved True"]]
    return directory


def test_two_processes_save_and_keep_two(saved):
    assert sorted(os.listdir(saved)) == ["2", "3"]


def test_one_process_restores_what_two_have_saved(saved, tmp_path):
    directory = shutil.copytree(saved, tmp_path / "checkpoints")
    assert _run(1, directory, "restore") == [["restored 3 3", "saved True"]]


def test_both_fall_back_when_only_one_reads_the_damage(saved, tmp_path):
    directory = shutil.copytree(saved, tmp_path / "checkpoints")
    # The rows of the second process lie in its own file, which the first does not read.
    victim = max((directory / "3/params/ocdbt.process_1/d").iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(victim, victim.stat().st_size // 2)
    found = _run(2, directory, "restore")
    for lines in found:
        assert lines[1:] == ["restored 2 2", "saved True"]
        assert "checkpoints/3 is damaged" in lines[0] and "renamed 3.corrupt" in lines[0]
    assert any("another process could not read its part" in lines[0] for lines in found)
    assert sorted(os.listdir(directory)) == ["2", "3.corrupt", "9"]
