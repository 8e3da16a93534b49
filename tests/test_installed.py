"""The package as it is installed from a wheel: shipped configs and their data come along; a config may lie anywhere."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = """from t5x_like.configs import common
from t5x_like.configs.pretrain import test

def get_config():
    assert common.config().loop.steps
    config = test.get_config()
    config.loop.steps = 2
    config.optim.schedule.warmup_steps = 0
    return config
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package alone, built from a copy of what a release holds."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    source, target = folder / "source", folder / "installed"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("t5x_like", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "install", *options, str(source), "-t", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return target


def call(installed, cwd, *arguments):
    """The command, with the installed package and nothing of the checkout, in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(installed)
    command = [sys.executable, "-P", "-m", "t5x_like", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_a_config_outside_of_the_checkout_trains_with_the_bundled_text(installed, tmp_path):
    (tmp_path / "mine.py").write_text(CONFIG)
    done = call(installed, tmp_path, "train", "--config=mine.py", "--workdir=run")
    assert done.returncode == 0 and "step 2/2" in done.stdout, done.stderr
    assert f"{installed}/t5x_like/configs/data/tinyshakespeare/input.txt" in (tmp_path / "run/config.json").read_text()
    (tmp_path / "old.py").write_text("from configs import common\n")
    done = call(installed, tmp_path, "train", "--config=old.py", "--workdir=run")
    assert done.returncode == 2 and "write `from t5x_like.configs import common`" in done.stderr


def test_a_shipped_config_is_named_from_any_folder(installed, tmp_path):
    done = call(installed, tmp_path, "prepare", "--config=pretrain/test", "--config.data.cache=cache")
    assert done.returncode == 0 and (tmp_path / "cache").is_dir(), done.stderr
    assert " bytes/s" not in done.stderr, "a text of a megabyte takes no time that could be measured"
    assert call(installed, tmp_path, "--version").stdout == "t5x_like 0.1.0\n"
