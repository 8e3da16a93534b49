"""A model directory is found as a workdir or as one checkpoint of it, and known without reading an array."""

import shutil
import subprocess
import sys

import jax.numpy as jnp
import pytest

from t5x_like.core.errors import UserError
from t5x_like.storage.checkpoint import Checkpoints
from t5x_like.storage.model_directory import DamagedCheckpoint, locate, read_metadata
from t5x_like.storage.reading import restore
from tests.storage.test_workdir import ROOT


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    root = tmp_path_factory.mktemp("model") / "run"
    (root / "tokenizer").mkdir(parents=True)
    (root / "tokenizer" / "tokenizer.json").write_text("{}")
    with Checkpoints(str(root / "checkpoints")) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, {"params": {"w": jnp.full(4, float(step))}}, {"config": {"seed": step}})
    return root


def test_the_newest_or_the_wanted_step_of_a_workdir(workdir):
    found = locate(str(workdir))
    assert found.checkpoint == str(workdir / "checkpoints" / "20") and found.steps == (10, 20)
    assert found.tokenizer == str(workdir / "tokenizer")
    assert read_metadata(locate(str(workdir), step=10).checkpoint)["config"] == {"seed": 10}


def test_one_checkpoint_in_its_place_or_moved_with_its_tokenizer(workdir, tmp_path):
    inside = locate(str(workdir / "checkpoints" / "10"))
    assert inside.checkpoint == str(workdir / "checkpoints" / "10") and inside.tokenizer == str(workdir / "tokenizer")
    moved = tmp_path / "my-model"
    shutil.copytree(workdir / "checkpoints" / "10", moved)
    shutil.copytree(workdir / "tokenizer", moved / "tokenizer")
    found = locate(str(moved))
    assert found.tokenizer == str(moved / "tokenizer") and read_metadata(found.checkpoint)["step"] == 10
    assert float(restore(found.checkpoint, {"params": {"w": jnp.zeros(4)}})["params"]["w"][0]) == 10


def test_what_is_none_is_one_clear_line(workdir, tmp_path):
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    for directory, step, message in (
        (tmp_path, None, "is no model directory: it has no checkpoints/"),
        (tmp_path / "new", None, "holds no checkpoint yet"),
        (workdir, 15, "holds no checkpoint of step 15; it has 10, 20"),
        (workdir / "checkpoints" / "10", 20, "is one checkpoint; leave the step out"),
    ):
        with pytest.raises(UserError, match=message):
            locate(str(directory), step=step)


def test_changed_metadata_is_damage(workdir, tmp_path):
    copy = shutil.copytree(workdir / "checkpoints" / "10", tmp_path / "10")
    file = copy / "metadata" / "metadata"
    file.write_text(file.read_text().replace('"seed": 10', '"seed": 11'))
    with pytest.raises(DamagedCheckpoint, match="its metadata is not what was saved"):
        read_metadata(str(copy))


def test_looking_needs_no_array_library(workdir):
    program = (
        "import sys\nfrom t5x_like.commands.inspect import describe\n"
        f"assert len(list(describe({str(workdir)!r}))) > 5\n"
        "assert not {'jax', 'numpy', 'orbax', 'tensorflow'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
