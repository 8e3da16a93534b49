"""Damaged checkpoints: found, named, put aside, the one before used, nothing deleted, later saves go on."""

import os
import pathlib
import shutil

import numpy as np
import pytest

from t5x_like.core.errors import UserError
from t5x_like.storage import paths
from t5x_like.storage.checkpoint import Checkpoints
from t5x_like.storage.model_directory import DamagedCheckpoint
from tests.storage.test_checkpoint import assert_equal_bits, make_state, mesh, sharded, template


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A directory with the steps 10 and 20. Copied by each test."""
    directory = tmp_path_factory.mktemp("two") / "checkpoints"
    with Checkpoints(str(directory)) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, sharded(make_state(step), mesh(4, 2)), {})
    return directory


@pytest.fixture
def directory(two_steps, tmp_path):
    return pathlib.Path(shutil.copytree(two_steps, tmp_path / "checkpoints"))


def _largest_file(directory: pathlib.Path) -> pathlib.Path:
    """The largest of the files that hold array data (descriptions of the arrays lie elsewhere)."""
    return max(directory.rglob("d/*"), key=lambda path: path.stat().st_size)


def _flip(path: pathlib.Path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(bytes(data))


def _restore_latest(directory, faults=None):
    with Checkpoints(str(directory), on_fault=(faults if faults is not None else []).append) as checkpoints:
        return checkpoints.restore_latest(template(make_state(), mesh(2, 2)))


def test_a_flipped_bit_in_the_data_is_found_and_its_leaf_named(directory):
    data = _largest_file(directory / "20" / "params")
    sound = data.read_bytes()
    random = np.random.default_rng(0)
    named = 0
    with Checkpoints(str(directory), read_only=True) as checkpoints:
        expected = template(make_state(), mesh(2, 2))
        for _ in range(30):
            _flip(data, int(random.integers(len(sound))), int(random.integers(8)))
            try:
                # The file also holds parts that nothing refers to: a flip there changes no value.
                assert_equal_bits(checkpoints.restore(20, expected), make_state(20))
            except DamagedCheckpoint as error:
                assert "\n" not in str(error) and len(str(error)) < 600 and "/20 is damaged" in str(error)
                named += "params/embed differs from what was saved" in str(error)
            data.write_bytes(sound)
        assert named > 20, "flips must get past Orbax for the fingerprints to be tested"
        assert_equal_bits(checkpoints.restore(20, expected), make_state(20))


def test_a_flip_anywhere_in_a_checkpoint_is_found_or_harmless(directory):
    files = sorted(path for path in (directory / "20").rglob("*") if path.is_file() and path.stat().st_size)
    random = np.random.default_rng(1)
    expected = template(make_state(), mesh(1, 1))
    with Checkpoints(str(directory), read_only=True) as checkpoints:
        for file in files:
            sound = file.read_bytes()
            _flip(file, int(random.integers(len(sound))), int(random.integers(8)))
            try:
                assert_equal_bits(checkpoints.restore(20, expected), make_state(20))
            except DamagedCheckpoint as error:
                assert "/20 is damaged" in str(error)
            file.write_bytes(sound)


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete", "empty folder", "metadata"])
def test_a_damaged_newest_is_named_and_put_aside_and_the_one_before_used(directory, harm):
    victim = _largest_file(directory / "20" / "optimizer")
    if harm == "flip":
        _flip(victim, victim.stat().st_size // 2, 3)
    elif harm == "truncate":
        os.truncate(victim, victim.stat().st_size // 2)
    elif harm == "delete":
        victim.unlink()
    elif harm == "empty folder":
        shutil.rmtree(directory / "20")
        (directory / "20").mkdir()
    else:
        _flip(directory / "20" / "metadata" / "metadata", 100, 0)
    before = paths.tree_files(str(directory / "20"))
    faults = []
    step, restored = _restore_latest(directory, faults)
    assert step == 10
    assert_equal_bits(restored, make_state(10))
    assert len(faults) == 1 and "/20 is damaged" in faults[0] and "renamed 20.corrupt" in faults[0]
    assert "\n" not in faults[0]
    assert paths.tree_files(str(directory / "20.corrupt")) == before


def test_training_goes_on_after_a_damaged_newest_and_keeps_the_sound_one(directory):
    os.truncate(_largest_file(directory / "20" / "params"), 100)
    with Checkpoints(str(directory), keep=lambda steps, metrics: steps[-2:], on_fault=[].append) as checkpoints:
        step, _ = checkpoints.restore_latest(template(make_state(), mesh(4, 2)))
        assert checkpoints.save(20, sharded(make_state(20), mesh(4, 2)), {})
        assert checkpoints.wait() and step == 10
        assert checkpoints.steps() == [10, 20]
        assert_equal_bits(checkpoints.restore(20, template(make_state(), mesh(1, 1))), make_state(20))
        os.truncate(_largest_file(directory / "20" / "params"), 100)
        assert checkpoints.restore_latest(template(make_state(), mesh(4, 2)))[0] == 10
    assert sorted(path.name for path in directory.iterdir()) == ["10", "20.corrupt", "20.corrupt-2"]


def test_when_all_are_damaged_the_run_does_not_silently_begin_again(directory):
    for step in ("10", "20"):
        os.truncate(_largest_file(directory / step / "params"), 100)
    for _ in range(2):
        with pytest.raises(UserError, match=r"none of the checkpoints \[10, 20\] in .*; restore one from a copy"):
            _restore_latest(directory)
    assert sorted(os.listdir(directory)) == ["10", "20"]


def test_a_reader_beside_the_run_renames_nothing(directory):
    os.truncate(_largest_file(directory / "20" / "params"), 100)
    (directory / "30.orbax-checkpoint-tmp").mkdir()
    names = sorted(os.listdir(directory))
    with (
        Checkpoints(str(directory), read_only=True) as checkpoints,
        pytest.raises(DamagedCheckpoint, match="/20 is damaged"),
    ):
        checkpoints.restore_latest(template(make_state(), mesh(1, 1)))
    assert sorted(os.listdir(directory)) == names


def test_what_a_killed_run_left_is_removed_at_the_next_start(directory):
    for name in ("30.orbax-checkpoint-tmp", "30.orbax-checkpoint-tmp-1234", "5.deleting"):
        (directory / name / "params").mkdir(parents=True)
    (directory / "notes.txt").write_text("a person's own file")
    with Checkpoints(str(directory)) as checkpoints:
        assert checkpoints.steps() == [10, 20]
    assert sorted(os.listdir(directory)) == ["10", "20", "notes.txt"]


@pytest.mark.parametrize("reason", ["PERMISSION_DENIED: no", "UNAVAILABLE: connection reset"])
def test_a_store_that_cannot_be_reached_is_no_damage(directory, monkeypatch, reason):
    def refuse(*_, **__):
        raise ValueError(reason)

    monkeypatch.setattr("orbax.checkpoint.PyTreeCheckpointHandler.restore", refuse)
    with pytest.raises(UserError, match="cannot be read") as caught:
        _restore_latest(directory)
    assert not isinstance(caught.value, DamagedCheckpoint)
    assert Checkpoints(str(directory), read_only=True).steps() == [10, 20]


def test_no_checkpoint_at_all_is_none(tmp_path):
    assert _restore_latest(tmp_path / "new") is None
