"""Reading a checkpoint in groups of bounded size, and leaves that are no plain arrays out of their record."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.core.errors import UserError
from t5x_like.storage.checkpoint import Checkpoints
from t5x_like.storage.model_directory import DamagedCheckpoint
from t5x_like.storage.reading import restore
from tests.storage.quantized import CONSTRUCTORS, Quantized

MEGABYTE = 2**20
PLAIN = jax.ShapeDtypeStruct((4, 2), jnp.float32)


def save(directory, params) -> str:
    with Checkpoints(str(directory)) as checkpoints:
        assert checkpoints.save(1, {"params": params}, {}) and checkpoints.wait()
    return str(directory / "1")


def read_bytes(checkpoint, group_bytes, monkeypatch) -> list[int]:
    """Bytes of each group that a restore reads."""
    from t5x_like.storage import reading

    seen, read = [], reading._read

    def counted(*arguments):
        arrays = read(*arguments)
        seen.append(sum(array.nbytes for array in arrays.values()))
        return arrays

    monkeypatch.setattr(reading, "_read", counted)
    wanted = {f"w{index}": jax.ShapeDtypeStruct((8, 8), jnp.bfloat16) for index in range(6)}
    restored = restore(checkpoint, {"params": wanted}, group_bytes=group_bytes)["params"]
    assert [float(restored[name][0, 0]) for name in sorted(restored)] == [float(index) for index in range(6)]
    return seen


@pytest.mark.parametrize(("limit", "expected"), [(10**9, [1536]), (512, [512] * 3), (700, [512] * 3), (1, [256] * 6)])
def test_groups_hold_no_more_than_the_limit_or_one_array(tmp_path, limit, expected, monkeypatch):
    checkpoint = save(tmp_path, {f"w{index}": jnp.full((8, 8), float(index)) for index in range(6)})
    assert read_bytes(checkpoint, limit, monkeypatch) == expected


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_converting_while_reading_holds_little_more_than_the_result(tmp_path):
    """192 MB of float32 become 96 MB of bfloat16: read at once, both lie side by side."""
    arrays = {f"w{index}": jnp.ones((2048, 2048)) for index in range(12)}
    checkpoint = save(tmp_path, arrays | {"small": jnp.ones(3)})
    del arrays

    def peak(group_bytes: int) -> int:
        command = [sys.executable, "-m", "tests.storage.reader", checkpoint, str(group_bytes)]
        # Of what is freed the C library would keep much for later; large pieces go back at once with this.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
        return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    assert peak(10**9) > 200
    assert peak(16 * MEGABYTE) < 96 + 5 * 16


def test_a_leaf_that_was_saved_as_another_kind_comes_back_as_it(tmp_path):
    weight = Quantized(jnp.arange(8, dtype=jnp.int8).reshape(4, 2), jnp.ones((1, 2)), ("embed", "mlp"))
    checkpoint = save(tmp_path, {"layers": {"up": weight, "norm": jnp.ones(4)}})
    wanted = {"layers": {"up": PLAIN, "norm": jax.ShapeDtypeStruct((4,), jnp.float32)}}
    placed: dict[str, tuple[int, ...]] = {}

    def place(path, shape):
        placed[path] = shape
        return jax.sharding.SingleDeviceSharding(jax.devices()[3])

    restored = restore(checkpoint, {"params": wanted}, kinds=CONSTRUCTORS, place=place)["params"]["layers"]
    assert isinstance(restored["up"], Quantized) and restored["up"].axes == ("embed", "mlp")
    np.testing.assert_array_equal(restored["up"].values, weight.values)
    assert restored["up"].values.dtype == jnp.int8 and restored["up"].values.devices() == {jax.devices()[3]}
    assert placed == {"layers/up/values": (4, 2), "layers/up/scales": (1, 2)}
    with pytest.raises(UserError, match=r"'layers/up' is of the kind 'quantized', which this program does not know"):
        restore(checkpoint, {"params": wanted})
    with pytest.raises(UserError, match=r"'layers/up' is \[4, 2\] there and \[2, 4\] here"):
        restore(checkpoint, {"params": {"layers": {"up": jax.ShapeDtypeStruct((2, 4), jnp.float32)}}})


def test_damage_in_any_group_is_found(tmp_path, monkeypatch):
    from t5x_like.storage import reading

    checkpoint = save(tmp_path, {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))})
    read = reading._read
    monkeypatch.setattr(reading, "_read", lambda *rest: {path: a + (path == "b") for path, a in read(*rest).items()})
    wanted = {name: jax.ShapeDtypeStruct((8, 8), jnp.float32) for name in "ab"}
    with pytest.raises(DamagedCheckpoint, match="params/b differs from what was saved"):
        restore(checkpoint, {"params": wanted}, group_bytes=256)
