"""gs:// for real, against a server of the same protocol: files, workdirs, locks, checkpoints, and what goes wrong."""

import builtins
import os
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.core.errors import UserError
from t5x_like.parallel.multihost import ALONE
from t5x_like.storage import bucket_file, lock, paths
from t5x_like.storage.checkpoint import Checkpoints
from t5x_like.storage.workdir import Workdir, read_config
from tests.storage.test_checkpoint import assert_equal_bits, make_state, mesh, sharded, template
from tests.storage.test_workdir import CONFIG, ROOT, _entry


@pytest.fixture
def bucket(fake_gcs):
    return fake_gcs.bucket()


def test_files_are_written_read_listed_copied_renamed_and_removed(bucket, tmp_path):
    root = paths.join(bucket, "run")
    assert not paths.exists(root) and paths.list_names(root) == []
    paths.write_text_atomic(paths.join(root, "a.txt"), "one")
    paths.write_json_atomic(paths.join(root, "b", "c.json"), {"x": 1})
    assert paths.exists(paths.join(root, "b")) and paths.is_directory(paths.join(root, "b"))
    assert paths.list_names(root) == ["a.txt", "b"]
    assert paths.read_text(paths.join(root, "a.txt")) == "one"
    assert paths.read_json(paths.join(root, "b", "c.json")) == {"x": 1}
    assert set(paths.tree_files(root)) == {"a.txt", "b/c.json"}
    paths.copy_tree(root, str(tmp_path / "local"))
    assert paths.tree_files(str(tmp_path / "local")) == paths.tree_files(root)
    paths.copy_tree(str(tmp_path / "local"), paths.join(bucket, "back"))
    paths.rename(paths.join(bucket, "back"), paths.join(bucket, "moved"))
    assert paths.list_names(bucket) == ["moved", "run"]
    assert paths.tree_files(paths.join(bucket, "moved")) == paths.tree_files(root)
    paths.remove_tree(root)
    paths.remove_tree(root)
    assert paths.list_names(bucket) == ["moved"]


def test_a_growing_folder_is_uploaded_where_it_changed(bucket):
    staged = paths.StagedDirectory(paths.join(bucket, "tensorboard"))
    for count in (1, 2):
        paths.write_text_atomic(os.path.join(staged.local_path, f"events.{count}"), "x" * count)
        staged.upload()
    staged.close()
    assert paths.tree_files(paths.join(bucket, "tensorboard")) == {"events.1": 1, "events.2": 2}


def test_checkpoints_are_saved_restored_deleted_and_put_aside(bucket):
    directory = paths.join(bucket, "run", "checkpoints")
    faults: list[str] = []
    with Checkpoints(directory, keep=lambda steps, metrics: steps[-2:], on_fault=faults.append) as checkpoints:
        for step in (1, 2, 3):
            assert checkpoints.save(step, sharded(make_state(step), mesh(4, 2)), {"config": {}}, metrics={"loss": step})
        assert checkpoints.wait() and checkpoints.steps() == [2, 3]
    assert paths.list_names(directory) == ["2", "3"]
    for name in paths.tree_files(f"{directory}/3/params"):
        if "d/" in name:
            paths.write_bytes_atomic(f"{directory}/3/params/{name}", b"damaged")
    # What a killed save leaves: a folder without the file that makes it count.
    paths.write_text_atomic(f"{directory}/4/params/d/x", "unfinished")
    with Checkpoints(directory, keep=lambda steps, metrics: steps[-2:], on_fault=faults.append) as checkpoints:
        assert checkpoints.steps() == [2, 3] and paths.list_names(directory) == ["2", "3"]
        step, restored = checkpoints.restore_latest(template(make_state(), mesh(2, 2)))
        assert checkpoints.save(3, sharded(make_state(3), mesh(4, 2)), {}) and checkpoints.wait()
    assert step == 2
    assert_equal_bits(restored, make_state(2))
    assert paths.list_names(directory) == ["2", "3", "3.corrupt"]
    assert len(faults) == 1 and "renamed 3.corrupt" in faults[0]


def test_tensorflow_stays_out(fake_gcs, bucket):
    program = (
        "import sys\nfrom t5x_like.storage import bucket_file, paths\nfrom etils import epath\n"
        f"paths.write_text_atomic('{bucket}/x', 'a')\nassert epath.Path('{bucket}/x').read_text() == 'a'\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'tensorflow']"
    )
    environment = {**os.environ, **fake_gcs.environment}
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_a_workdir_is_made_and_opened_again(bucket):
    root = paths.join(bucket, "runs", "one")
    for _ in range(2):
        with Workdir.open(root, processes=ALONE) as workdir:
            assert workdir.check_config(CONFIG, may_change=()) == []
            paths.write_text_atomic(paths.join(workdir.tokenizer, "tokenizer.json"), "{}")
            workdir.record_start(config=CONFIG, overrides={}, entry=_entry())
            assert paths.exists(paths.join(root, "lock.json"))
    assert read_config(root) == CONFIG and len(workdir.manifest()["starts"]) == 2
    assert not paths.exists(paths.join(root, "lock.json"))


def test_a_lock_that_beats_is_refused_and_a_silent_one_taken_over(bucket, capsys):
    root = paths.join(bucket, "run")
    stop = threading.Event()
    other = {"host": "elsewhere", "pid": 1, "since": "today"}

    def beat():
        count = 0
        while not stop.is_set():
            count += 1
            paths.write_json_atomic(paths.join(root, "lock.json"), {**other, "beat": count})
            time.sleep(0.05)

    thread = threading.Thread(target=beat)
    thread.start()
    while not paths.exists(paths.join(root, "lock.json")):
        time.sleep(0.01)
    with pytest.raises(UserError, match=r"in use by process 1 on elsewhere"), lock.locked(root, beat_seconds=0.3):
        pass
    stop.set()
    thread.join()
    with lock.locked(root, beat_seconds=0.1):
        assert paths.read_json(paths.join(root, "lock.json"))["pid"] == os.getpid()
    assert "waiting" in capsys.readouterr().out and not paths.exists(paths.join(root, "lock.json"))


def test_a_bucket_that_is_not_there_is_one_clear_line(fake_gcs):
    for use in (paths.make_directory, lambda path: paths.write_text_atomic(path, "x"), paths.read_text):
        with pytest.raises(UserError, match="gs://nobody-made-this/run") as caught:
            use("gs://nobody-made-this/run")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="there is no bucket 'nobody-made-this', or it may not be seen; create it"):
        paths.make_directory("gs://nobody-made-this/run")
    with pytest.raises(UserError, match="there is no bucket"), Checkpoints("gs://nobody-made-this/run"):
        pass


def test_without_the_extra_the_remedy_is_named(monkeypatch):
    original = builtins.__import__

    def without(name, *rest, **named):
        if name == "gcsfs":
            raise ImportError(name)
        return original(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"need the extra gcs: pip install 't5x_like\[gcs\]'"):
        paths.exists("gs://bucket/x")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("Forbidden: b/x\nno access"), "access refused .*; give credentials"),
        (ConnectionError("refused"), "cannot be reached"),
    ],
)
def test_refused_and_unreachable_are_one_line(fake_gcs, bucket, monkeypatch, error, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(bucket_file.client(), "pipe_file", fail)
    with pytest.raises(UserError, match=message) as caught:
        paths.write_text_atomic(paths.join(bucket, "x"), "a")
    assert "\n" not in str(caught.value)


def test_real_refusals_of_the_client_are_credentials(fake_gcs, bucket, monkeypatch):
    from gcsfs.retry import HttpError
    from google.auth.exceptions import DefaultCredentialsError

    for error in (HttpError({"code": 401, "message": "Anonymous caller"}), DefaultCredentialsError("not found")):

        def fail(*_, error=error, **__):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(bucket_file.client(), "pipe_file", fail)
            with pytest.raises(UserError, match="access refused .*gcloud auth application-default login"):
                paths.write_text_atomic(paths.join(bucket, "x"), "a")


def test_special_arrays_survive_the_bucket(bucket):
    params = {"w": jnp.asarray(np.arange(64, dtype=np.int8).reshape(8, 8)), "b": jnp.ones(8, jnp.bfloat16)}
    with Checkpoints(bucket, asynchronous=False) as checkpoints:
        assert checkpoints.save(1, {"params": params}, {})
        assert_equal_bits(checkpoints.restore(1, {"params": params})["params"], params)
