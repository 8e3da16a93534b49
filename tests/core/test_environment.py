"""The environment is set before jax starts, is the same when set twice, and says when it comes too late."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from t5x_like.core import environment
from t5x_like.core.errors import UsageError
from tests.training.faults_worker import CONFIG

ROOT = pathlib.Path(__file__).parents[2]
PLAIN = dataclasses.replace(CONFIG, threads=0, fake_devices=0, platform="")


def run(code: str, **variables: str) -> dict:
    """Runs code in a fresh process; what it leaves in `result` comes back as JSON."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("JAX_", "NPROC", "TF_CPP", "GRPC", "XLA_FLAGS"))
    }
    prelude = (
        "import dataclasses, json, os, sys\n"
        "from t5x_like.core import environment\n"
        "from tests.training.faults_worker import CONFIG\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{prelude}{code}\nprint(json.dumps(result))"],
        env={**kept, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **variables},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "stdout": done.stdout, "stderr": done.stderr}


def test_jax_is_not_imported_and_a_second_apply_changes_nothing(tmp_path):
    result = run(
        """
first = environment.apply(CONFIG)
before = dict(os.environ)
second = environment.apply(CONFIG)
result = {"jax": "jax" in sys.modules, "same": first == second and before == dict(os.environ),
          "environ": dict(os.environ), "threads": first.threads, "cache": first.compilation_cache}
""",
        XDG_CACHE_HOME=str(tmp_path),
        XLA_FLAGS="--xla_force_host_platform_device_count=3",
    )
    environ = result["environ"]
    assert not result["jax"]
    assert result["same"]
    assert environ["NPROC"] == "1" and result["threads"] == 1
    assert environ["JAX_NUM_CPU_DEVICES"] == "2"
    assert "XLA_FLAGS" not in environ, "jax refuses both ways of asking for devices at once"
    assert environ["JAX_COMPILATION_CACHE_DIR"] == result["cache"]
    assert pathlib.Path(result["cache"]).parent == tmp_path / "t5x_like" / "compiled"
    assert environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0"
    assert environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] == "-1"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", "glibc.malloc.tcache_count=0"),
        ("glibc.malloc.arena_max=2", "glibc.malloc.arena_max=2:glibc.malloc.tcache_count=0"),
        ("glibc.malloc.tcache_count=7", "glibc.malloc.tcache_count=7"),
    ],
)
def test_an_older_glibc_loses_its_tcache_once_and_a_persons_choice_is_kept(given, expected):
    starts = """
import platform
print("start", os.getpid(), flush=True)
environment.restart_without_tcache()
result = {"tunables": os.environ["GLIBC_TUNABLES"], "pid": os.getpid(), "libc": platform.libc_ver()}
"""
    done = run(starts, GLIBC_TUNABLES=given)
    kind, version = done["libc"]
    needed = kind == "glibc" and tuple(map(int, version.split("."))) < (2, 39)
    assert done["tunables"] == (expected if needed else given)
    said = [line for line in done["stdout"].splitlines() if line.startswith("start")]
    assert said == [f"start {done['pid']}"] * (2 if needed and expected != given else 1), "the same process"


def test_jax_starts_with_the_threads_and_devices_asked_for(tmp_path):
    result = run(
        """
config = dataclasses.replace(CONFIG, threads=5, fake_devices=4)
environment.apply(config)
import jax
jax.numpy.ones(3).sum().block_until_ready()
names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
result = {"threads": names.count("tf_XLAEigen"), "devices": jax.device_count(),
          "cache": jax.config.jax_compilation_cache_dir}
""",
        JAX_COMPILATION_CACHE_DIR=str(tmp_path),
    )
    assert result["threads"] == 5, "XLA has as many, or one per device if these are more"
    assert result["devices"] == 4
    assert result["cache"] == str(tmp_path), "a folder named in the environment is kept"


def test_jax_that_is_imported_but_not_started_is_told_too():
    result = run(
        """
import jax
environment.apply(dataclasses.replace(CONFIG, compilation_cache="off"))
result = {"devices": jax.device_count(), "cached": jax.config.jax_enable_compilation_cache}
"""
    )
    assert result["devices"] == 2
    assert not result["cached"]


DAMAGE = """
environment.apply(CONFIG)
import jax, pathlib
def twice(x): return x * 2
jax.jit(twice)(1.0).block_until_ready()
(entry,) = pathlib.Path(environment.apply(CONFIG).compilation_cache).glob("jit_twice-*-cache")
result = {"bytes": entry.read_bytes().hex()}
"""


def test_a_damaged_cache_entry_is_deleted_and_written_anew(tmp_path):
    whole = run(DAMAGE, JAX_COMPILATION_CACHE_DIR=str(tmp_path))
    (entry,) = tmp_path.glob("jit_twice-*-cache")
    assert "damaged" not in whole["stderr"]
    entry.write_bytes(entry.read_bytes()[:50])
    again = run(DAMAGE, JAX_COMPILATION_CACHE_DIR=str(tmp_path))
    assert len(bytes.fromhex(again["bytes"])) > 50
    assert "damaged entry of the compilation cache deleted" in again["stderr"]
    assert "UserWarning" not in again["stderr"]


def test_the_cache_keeps_within_its_bytes(tmp_path):
    for age in range(4):
        path = tmp_path / f"jit_f{age}-x-cache"
        path.write_bytes(b"0" * 100)
        os.utime(path, (1_000_000_000 - age,) * 2)
    (tmp_path / "other").write_bytes(b"0" * 1000)
    environment._prune(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jit_f0-x-cache", "jit_f1-x-cache", "other"]


def test_a_cache_folder_that_cannot_be_made_is_a_note(tmp_path):
    (tmp_path / "file").write_text("")
    result = run(
        f"""
config = dataclasses.replace(CONFIG, compilation_cache={str(tmp_path / "file" / "cache")!r})
applied = environment.apply(config)
result = {{"cache": applied.compilation_cache, "notes": applied.notes}}
"""
    )
    assert result["cache"] is None
    assert "no compilation cache" in result["notes"][0]


@pytest.mark.parametrize(
    ("threads", "recorded", "variable", "chosen", "note"),
    [
        (0, None, None, None, None),
        (0, None, "5", 5, None),
        (3, None, "5", 3, None),
        (0, 7, None, 7, "7 threads as at the first start"),
        (3, 7, None, 3, "the bits of its losses will differ"),
        (7, 7, None, 7, None),
    ],
)
def test_a_resume_uses_the_recorded_threads_or_says_that_bits_differ(
    monkeypatch, threads, recorded, variable, chosen, note
):
    monkeypatch.setenv("NPROC", variable) if variable else monkeypatch.delenv("NPROC", raising=False)
    notes: list[str] = []
    config = dataclasses.replace(PLAIN, threads=threads)
    assert environment._threads(config, recorded, notes) == (chosen or environment.cores())
    assert bool(notes) == bool(note)
    assert note is None or note in notes[0]


@pytest.mark.parametrize("change", [{"fake_devices": 3}, {"threads": 77}, {"platform": "tpu"}])
def test_what_comes_after_jax_has_started_is_refused(monkeypatch, change):
    import jax

    assert jax.device_count() == 8
    monkeypatch.setattr(os, "environ", dict(os.environ))
    environment.apply(dataclasses.replace(PLAIN, fake_devices=8 if jax.default_backend() == "cpu" else 0))
    with pytest.raises(UsageError, match="this process has started jax"):
        environment.apply(dataclasses.replace(PLAIN, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"platform": "gpus"}, "config.runtime.platform='gpus'"),
        ({"threads": -1}, "config.runtime.threads=-1"),
        ({"heartbeat_seconds": 1}, "should be at least 10"),
        ({"fake_devices": 4, "platform": "tpu"}, "needs config.runtime.platform='cpu'"),
        (
            {"phase_seconds": dataclasses.replace(CONFIG.phase_seconds, step=-1.0)},
            "config.runtime.phase_seconds.step=-1",
        ),
    ],
)
def test_values_out_of_range_are_named(change, message):
    with pytest.raises(UsageError, match=message):
        environment.apply(dataclasses.replace(PLAIN, **change))
