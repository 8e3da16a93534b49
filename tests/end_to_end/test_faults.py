"""What goes wrong around a run, as its user sees it: damaged checkpoints, a full disk, lost data, bad updates.

Each test asks for the exit status, for the one line that names place and remedy, and that nothing of the run is lost;
where a remedy is named, it is followed. In process, on 8 fake devices, with the smallest config. Not here: kills
(test_crash.py), processes that hang or lose each other (test_two_processes.py), bad configs (test_bad_input.py).
"""

import contextlib
import os
import pathlib
import pty
import shutil
import signal
import sys

import numpy as np
import pytest

from t5x_like.__main__ import main
from t5x_like.core.metrics import is_measurement
from t5x_like.data.read.loader import TrainData
from t5x_like.data.write import sources
from t5x_like.storage import paths
from t5x_like.training.saver import Saver
from tests.data import corpus
from tests.storage.test_failed_saves import small_disk  # noqa: F401
from tools import crash_test

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = "--config=configs/pretrain/test.py"
EVERY = ("--config.checkpoint.every_steps=4", "--config.evaluate.every_steps=4")
HALF, WHOLE = 8, 16
GO_ON = f"--config.loop.steps={WHOLE}"
FULL = "No space left on device"


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two undisturbed runs, of 8 and of 16 steps, over one token cache; only read."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for name, steps in (("half", HALF), ("whole", WHOLE)):
            length = (f"--config.loop.steps={steps}", f"--config.optim.schedule.steps={WHOLE}")
            assert main(["train", CONFIG, *EVERY, *length, _cache(folder / "cache"), _to(folder / name)]) == 0
    return folder


@pytest.fixture
def workdir(runs, tmp_path):
    """A copy of the run of 8 steps, with the checkpoints 4 and 8."""
    return pathlib.Path(shutil.copytree(runs / "half", tmp_path / "run"))


def _to(workdir):
    return f"--workdir={workdir}"


def _cache(folder):
    return f"--config.data.cache={folder}"


def _rows(workdir):
    """The rows without what may differ between equal runs."""
    rows = crash_test.read_rows(workdir / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not is_measurement(name)} for row in rows]


def _steps(workdir):
    return sorted(os.listdir(workdir / "checkpoints"))


def _contents(folder):
    return {name: (folder / name).read_bytes() for name in paths.tree_files(str(folder))}


def _of_the_run(workdir):
    """What a start that fails before its first step leaves as it was: all but the lock and the account of its time."""
    return {name: content for name, content in _contents(workdir).items() if name not in ("lock", "goodput.jsonl")}


def _lines(capture):
    """What the command said on stderr, but for the progress of `prepare`."""
    return [line for line in capture.readouterr().err.splitlines() if not line.startswith("prepare: ")]


# Damaged checkpoints.


def _data_files(checkpoint):
    """The largest first. Some of their bytes, or all, may belong to no array."""
    return sorted((checkpoint / "params").rglob("d/*"), key=lambda path: path.stat().st_size, reverse=True)


def _is_changed(checkpoint, before):
    after = crash_test.read_arrays(checkpoint)
    return any(after[name].tobytes() != array.tobytes() for name, array in before.items())


def _truncate(checkpoint):
    """By so much that an array cannot be read."""
    for file in _data_files(checkpoint):
        while size := file.stat().st_size // 2:
            os.truncate(file, size)
            try:
                crash_test.read_arrays(checkpoint)
            except Exception:
                return
    raise AssertionError("no file was needed")


def _flip_a_bit(checkpoint):
    """One that Orbax does not notice, though an array changes by it."""
    before = crash_test.read_arrays(checkpoint)
    for file in _data_files(checkpoint):
        sound = file.read_bytes()
        for position in range(len(sound) // 4, len(sound), len(sound) // 16 + 1):
            file.write_bytes(sound[:position] + bytes([sound[position] ^ 1]) + sound[position + 1 :])
            with contextlib.suppress(Exception):
                if _is_changed(checkpoint, before):
                    return
        file.write_bytes(sound)
    raise AssertionError("no flip changed an array")


@pytest.mark.parametrize("damage", [_truncate, _flip_a_bit])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(runs, workdir, damage, capsys):
    damage(workdir / "checkpoints" / "8")
    kept = _contents(workdir / "checkpoints" / "8")
    capsys.readouterr()
    assert main(["train", _to(workdir), GO_ON]) == 0
    (line,) = _lines(capsys)
    assert line.startswith(f"t5x_like: checkpoint {workdir}/checkpoints/8 is damaged: ")
    assert line.endswith("it was renamed 8.corrupt, step 4 is used")
    assert _steps(workdir) == ["12", "16", "8.corrupt"]
    assert _contents(workdir / "checkpoints" / "8.corrupt") == kept
    assert _rows(workdir) == _rows(runs / "whole")


def test_a_run_without_a_sound_checkpoint_stops_and_changes_none(workdir, capsys):
    for step in ("4", "8"):
        _truncate(workdir / "checkpoints" / step)
    before = _contents(workdir / "checkpoints"), _rows(workdir)
    assert main(["train", _to(workdir), GO_ON]) == 1
    (line,) = _lines(capsys)
    assert f"none of the checkpoints [4, 8] in {workdir}/checkpoints can be restored" in line
    assert line.endswith("restore one from a copy, or start in a new workdir")
    assert (_contents(workdir / "checkpoints"), _rows(workdir)) == before


# A full disk.


class Disk:
    """A file system to be filled: a real one of 4 MiB, or, without the right to mount it, a word to Orbax."""

    def __init__(self, mounted, folder, monkeypatch):
        self.folder, self.real, self._patch = mounted or folder, mounted is not None, monkeypatch

    def fill(self, *, room=0):
        """Leaves `room` bytes."""
        if not self.real:
            self._patch.setattr("orbax.checkpoint.PyTreeCheckpointHandler.finalize", self._refuse)
            return
        with open(self.folder / "ballast", "wb", buffering=0) as file:
            with contextlib.suppress(OSError):
                while file.write(bytes(1 << 12)):
                    pass
            file.truncate(file.tell() - room)

    def free(self):
        self._patch.undo()
        (self.folder / "ballast").unlink(missing_ok=True)

    def _refuse(self, *_, **__):
        raise ValueError(f"RESOURCE_EXHAUSTED: Failed to write: {FULL}")


@pytest.fixture
def disk(small_disk, tmp_path):  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        yield Disk(small_disk, tmp_path, patch)


def test_a_disk_that_is_full_for_a_while_costs_one_checkpoint_and_no_row(runs, disk, monkeypatch, capfd):
    workdir = pathlib.Path(shutil.copytree(runs / "half", disk.folder / "run"))
    save = Saver.save

    def save_on_a_full_disk(self, step, *others):
        self._checkpoints.wait()  # what becomes of the save before is decided
        disk.fill() if step == 12 else disk.free()
        save(self, step, *others)

    monkeypatch.setattr(Saver, "save", save_on_a_full_disk)
    assert main(["train", _to(workdir), GO_ON]) == 0
    (line,) = _lines(capfd)
    assert line.startswith(f"t5x_like: checkpoint {workdir}/checkpoints/12 could not be saved (") and FULL in line
    assert line.endswith("the run goes on, its newest checkpoint is 8; free disk space or check the directory")
    assert _steps(workdir) == ["16", "8"]
    assert _rows(workdir) == _rows(runs / "whole")


def test_a_disk_without_room_for_the_last_checkpoint_fails_the_run_until_there_is(runs, disk, capfd):
    workdir = pathlib.Path(shutil.copytree(runs / "half", disk.folder / "run"))
    before = [_contents(workdir / "checkpoints" / step) for step in ("4", "8")]
    disk.fill(room=1 << 18)
    assert main(["train", _to(workdir), GO_ON]) == 1
    *faults, line = _lines(capfd)
    assert [f"/{step} could not be saved" in fault for step, fault in zip((12, 16), faults, strict=True)] == [True] * 2
    assert line.startswith(f"t5x_like: the last checkpoint could not be saved in {workdir}/checkpoints; free disk sp")
    assert [_contents(workdir / "checkpoints" / step) for step in ("4", "8")] == before
    disk.free()
    assert main(["train", _to(workdir)]) == 0
    assert _steps(workdir) == ["12", "16"] and _rows(workdir) == _rows(runs / "whole")


def test_a_start_on_a_full_disk_is_one_line_and_changes_nothing(runs, disk, capfd):
    if not disk.real:
        pytest.skip("no right to mount a small disk")
    workdir = pathlib.Path(shutil.copytree(runs / "half", disk.folder / "run"))
    before = _of_the_run(workdir)
    disk.fill()
    assert main(["train", _to(workdir), GO_ON]) == 1
    (line,) = _lines(capfd)
    assert line.startswith(f"t5x_like: {workdir}/") and f"cannot be written ({FULL}); free disk space" in line
    assert _of_the_run(workdir) == before
    assert main(["prepare", CONFIG, _cache(disk.folder / "cache")]) == 1
    (line,) = _lines(capfd)
    assert FULL in line and str(disk.folder / "cache") in line


# The token cache.


@pytest.fixture
def shard(runs, tmp_path):
    """The training tokens in a copy of the cache."""
    cache = pathlib.Path(shutil.copytree(runs / "cache", tmp_path / "cache"))
    return max(cache.rglob("shard-*.bin"), key=lambda path: path.stat().st_size)


def _flip_last(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


HARM = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "deleted": lambda path: path.unlink(),
    "changed": _flip_last,
}


@pytest.mark.parametrize("harm", ["truncated", "deleted"])
def test_a_lost_shard_is_written_again_where_its_source_is(runs, workdir, shard, harm, capsys):
    sound = shard.read_bytes()
    HARM[harm](shard)
    assert main(["train", _to(workdir), GO_ON, _cache(shard.parents[1])]) == 0
    assert _lines(capsys) == [] and shard.read_bytes() == sound
    assert _rows(workdir) == _rows(runs / "whole")


@pytest.mark.parametrize("harm", HARM)
def test_a_lost_shard_is_named_where_its_source_is_not(workdir, shard, harm, capsys, monkeypatch):
    HARM[harm](shard)
    before = _of_the_run(workdir)
    monkeypatch.chdir(workdir)  # the source of the config is a relative path, and no text of the program's own either
    monkeypatch.setattr(sources, "_SHIPPED", workdir)
    verify = "--config.data.verify=True"  # a size is always checked, a checksum when this is asked for
    assert main(["train", _to(workdir), GO_ON, _cache(shard.parents[1]), verify]) == 1
    (line,) = _lines(capsys)
    assert line.startswith(f"t5x_like: {shard}: ") and "delete this file and run `t5x_like prepare` again" in line
    assert _of_the_run(workdir) == before


def test_a_shard_lost_while_it_is_read_stops_the_run_which_resumes_with_a_new_one(
    runs, workdir, shard, capsys, monkeypatch
):
    read = TrainData.rows

    def rows(self, step, rows):
        if step == 13:
            os.truncate(shard, 100)
        return read(self, step, rows)

    monkeypatch.setattr(TrainData, "rows", rows)
    assert main(["train", _to(workdir), GO_ON, _cache(shard.parents[1])]) == 1
    (line,) = _lines(capsys)
    assert line.startswith(f"t5x_like: {shard}: ends at byte ") and "run `t5x_like prepare` again" in line
    assert _steps(workdir) == ["12", "8"]
    monkeypatch.setattr(TrainData, "rows", read)
    shard.unlink()
    assert main(["train", _to(workdir)]) == 0
    assert _rows(workdir) == _rows(runs / "whole")


# Bad updates.


def test_an_update_that_is_not_finite_stops_the_run_and_can_be_skipped(runs, tmp_path, capsys):
    workdir = tmp_path / "run"
    arguments = ("--config.optim.learning_rate=1e30", "--config.optim.schedule.warmup_steps=0")
    length = ("--config.loop.steps=4", "--config.checkpoint.every_steps=1")
    assert main(["train", CONFIG, *arguments, *length, _cache(runs / "cache"), _to(workdir)]) == 1
    (line,) = _lines(capsys)
    assert line.startswith("t5x_like: step 2: loss ") and "gradient norm nan" in line
    assert "config.loop.on_nonfinite=stop; 'skip' goes on; t5x_like inspect DIR --step=2 names" in line
    assert _steps(workdir) == ["1"]
    before = crash_test.read_arrays(workdir / "checkpoints" / "1")
    assert main(["train", _to(workdir), "--config.loop.on_nonfinite=skip"]) == 0
    rows = [row for row in _rows(workdir) if "train/loss" in row]
    assert [(row["step"], row.get("train/skipped")) for row in rows] == [(1, None), (2, 1.0), (3, 1.0), (4, 1.0)]
    after = crash_test.read_arrays(workdir / "checkpoints" / "4")
    for name, array in after.items():
        if not name.startswith("state/"):
            assert np.isfinite(array).all() and np.array_equal(array, before[name]), name
    assert (after["state/step"], after["state/skipped"]) == (4, 3) != (before["state/step"], before["state/skipped"])


@pytest.fixture
def noise(tmp_path):
    """A text of one letter that is noise where step 10 reads it."""
    path = tmp_path / "text.txt"
    text = bytearray(b"a" * 12800)
    path.write_bytes(text)
    data = corpus.opened(corpus.config(source=f"text:{path}", batch_size=8, length=32), tmp_path / "probe")
    for place in data.documents(9):
        inside = slice(place.text_byte + 1, place.text_byte + 32)
        text[inside] = np.random.default_rng(place.text_byte).integers(33, 97, 31, dtype=np.uint8).tobytes()
    data.close()
    path.write_bytes(text)
    return path


def test_a_spike_stops_the_run_its_text_is_found_and_it_can_be_skipped(noise, tmp_path, capsys):
    workdir = tmp_path / "run"
    data = (f"--config.data.source=text:{noise}", "--config.data.validation=", *EVERY, "--config.loop.steps=12")
    fields = ("on_spike=stop", "spike_warmup=4", "spike_memory=0.5", "spike_deviations=3.0")
    assert main(["train", CONFIG, *data, *(f"--config.loop.{field}" for field in fields), _to(workdir)]) == 1
    (line,) = _lines(capsys)
    assert line.startswith("t5x_like: step 10: loss ") and "is a spike; the update was refused and the run" in line
    assert "config.loop.on_spike=stop; 'skip' goes on; t5x_like inspect DIR --step=10 names" in line
    assert _steps(workdir) == ["4", "8"]
    assert main(["inspect", str(workdir), "--step=10"]) == 0
    for row in capsys.readouterr().out.splitlines()[2:]:
        text_byte, file = int(row.split()[5]), row.split()[-1]
        assert b"a" not in pathlib.Path(file).read_bytes()[text_byte + 1 : text_byte + 32]
    assert main(["train", _to(workdir), "--config.loop.on_spike=skip"]) == 0
    rows = {row["step"]: row for row in _rows(workdir)}
    assert [step for step, row in rows.items() if "train/skipped" in row] == [10]
    assert rows[11]["train/loss"] < rows[9]["train/loss"] < rows[10]["train/loss"] / 2


@pytest.mark.filterwarnings("ignore:.*fork:")  # the child becomes another program at once
def test_a_run_whose_terminal_is_closed_saves_and_says_75(runs, tmp_path):
    workdir = tmp_path / "run"
    command = ["-m", "t5x_like", "train", CONFIG, _cache(runs / "cache"), _to(workdir), "--config.loop.steps=100000"]
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(ROOT)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests under nohup ignores it
        os.execv(sys.executable, [sys.executable, *command])
    shown = b""
    with contextlib.suppress(OSError):  # the child has ended
        while b"step 3/" not in shown:
            shown += os.read(terminal, 4096)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 75, shown[-2000:]
    steps = _steps(workdir)
    assert steps and "SIGHUP: saves after this step and ends" in (workdir / "log.txt").read_text()
    assert _rows(workdir)[-1]["step"] == int(steps[-1])
