"""Programs that were compiled before are found again, and nothing else is."""

import os
import time
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_like.planner import cache, compile
from t5x_like.planner.topology import topology

CONTENT = {"error": "", "text": "HloModule m", "memory": {}, "seconds": 1.5}


def device(kind="TPU v5p", coordinates=(0, 0, 0), **more):
    return types.SimpleNamespace(device_kind=kind, coords=coordinates, core_on_chip=0, **more)


def test_what_decides_what_a_compiler_says_is_in_the_name(monkeypatch):
    def name(program="module", devices=None, options=None):
        return cache.key(program, devices=devices or [device()], options=options or {})

    first = name()
    assert first == name()
    assert name(options={"a": "1", "b": "2"}) == name(options={"b": "2", "a": "1"})
    others = [
        name("another"),
        name(devices=(device("TPU v5 lite"),)),
        name(devices=(device(coordinates=(1, 0, 0)),)),
        name(devices=(device(slice_index=1),)),
        name(options={"a": "1"}),
    ]
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_x=1")
    assert len({first, *others, name()}) == 7
    monkeypatch.delenv("LIBTPU_INIT_ARGS")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_cpu_use_x=1")
    assert name() == first
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_x=1 --xla_some_pass=false")
    assert name() not in {first, *others}


@pytest.mark.parametrize("damage", [b"", b"no gzip", None])
def test_what_cannot_be_read_is_not_there(tmp_path, damage):
    cache.write(tmp_path, "a", CONTENT)
    path = tmp_path / "a.json.gz"
    assert cache.read(tmp_path, "a") == CONTENT
    path.write_bytes(path.read_bytes()[:20] if damage is None else damage)
    assert cache.read(tmp_path, "a") is None
    assert cache.read(tmp_path, "never written") is None


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    cache.write(tmp_path / "file", "a", CONTENT)
    assert cache.read(tmp_path / "file", "a") is None


def test_the_longest_unread_goes_first(tmp_path, monkeypatch):
    for number, name in enumerate("abc"):
        cache.write(tmp_path, name, CONTENT)
        os.utime(tmp_path / f"{name}.json.gz", (number, number))
    assert cache.read(tmp_path, "a") == CONTENT  # now b is the oldest
    monkeypatch.setattr(cache, "BYTES", 3 * (tmp_path / "a.json.gz").stat().st_size)
    cache.write(tmp_path, "d", CONTENT)
    assert sorted(path.name[0] for path in tmp_path.iterdir()) == ["a", "c", "d"]


def test_what_a_process_that_died_was_writing_goes_after_a_day(tmp_path):
    for name, age in (("old", 2 * 86400), ("new", 60)):
        (tmp_path / f"{name}.tmp").write_bytes(b"half")
        os.utime(tmp_path / f"{name}.tmp", (time.time() - age,) * 2)
    cache.write(tmp_path, "a", CONTENT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json.gz", "new.tmp"]


def test_a_refusal_that_leaves_no_text_is_asked_for_once(compiler, tmp_path, monkeypatch):
    """A refusal of 160 GB for 16, of which the compiler wrote no text."""
    mesh = Mesh(topology("v5e:1x1").devices, ("data",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct((200_000, 200_000), jnp.float32, sharding=NamedSharding(mesh, P()))
    asked, looked = [], []
    ask = compile._asked
    monkeypatch.setattr(compile, "_asked", lambda *given, **more: asked.append(1) or ask(*given, **more))
    monkeypatch.setattr(compile, "_refused", lambda lowered: looked.append(1) and "")
    for anyway, times in ((False, (1, 0)), (True, (2, 1)), (True, (2, 1)), (False, (2, 1))):
        with pytest.raises(compile.DoesNotFit) as refusal:
            compile.compile_program(jax.jit(jnp.sin), (x,), mesh=mesh, options={}, kept=tmp_path, anyway=anyway)
        assert refusal.value.compiled is None
        assert (len(asked), len(looked)) == times


def test_a_program_is_compiled_once(compiler, tmp_path, monkeypatch):
    mesh = Mesh(topology("v5e:1x1").devices, ("data",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
    asked = []
    ask = compile._asked
    monkeypatch.setattr(compile, "_asked", lambda *given, **more: asked.append(1) or ask(*given, **more))

    def plan(function, **options):
        step = jax.jit(function, compiler_options=options)
        return compile.compile_program(step, (x,), mesh=mesh, options=options, kept=tmp_path)

    def function(x):
        with jax.named_scope("one"):
            return x @ x

    def elsewhere(x):
        # The same on other lines.
        with jax.named_scope("one"):
            return x @ x

    def renamed(x):
        with jax.named_scope("two"):
            return x @ x

    elsewhere.__name__ = renamed.__name__ = "function"
    first = plan(function)
    again = plan(elsewhere)
    assert len(asked) == 1
    assert (again.text, again.memory) == (first.text, first.memory)
    assert "two/dot_general" in plan(renamed).text
    plan(function, xla_tpu_scoped_vmem_limit_kib="32768")
    assert len(asked) == 3
