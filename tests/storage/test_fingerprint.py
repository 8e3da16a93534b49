"""The fingerprint of an array: the same on every mesh, another for every change of its bits or their places."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from t5x_like.storage.fingerprint import fingerprints


def _values(dtype: str, shape: tuple[int, ...] = (8, 16)) -> np.ndarray:
    random = np.random.default_rng(0)
    if dtype == "bool":
        return random.random(shape) < 0.5
    return (random.standard_normal(shape) * 3).astype(dtype)


def _on(values: np.ndarray, mesh_shape: tuple[int, int], spec: PartitionSpec) -> jax.Array:
    devices = np.array(jax.devices()[: mesh_shape[0] * mesh_shape[1]]).reshape(mesh_shape)
    return jax.device_put(values, NamedSharding(Mesh(devices, ("x", "y"), axis_types=(AxisType.Auto,) * 2), spec))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "int32", "uint8", "bool", "int4"])
def test_layout_does_not_change_it(dtype):
    values = _values(dtype)
    layouts = [
        _on(values, (1, 1), PartitionSpec()),
        _on(values, (4, 2), PartitionSpec("x", "y")),
        _on(values, (2, 4), PartitionSpec("y", "x")),
        _on(values, (8, 1), PartitionSpec(None, "x")),
        _on(values, (2, 2), PartitionSpec()),
    ]
    assert len({array.sharding for array in layouts}) == len(layouts)
    found = fingerprints({str(index): array for index, array in enumerate(layouts)})
    assert len(set(found.values())) == 1


def test_each_number_of_four_bits_has_its_own():
    """0 and 0.5 of float4, too: a cast to whole numbers would make them one."""
    every = jax.lax.bitcast_convert_type(jnp.arange(16).astype(jnp.uint4), jnp.float4_e2m1fn)
    found = fingerprints({str(index): every[index : index + 1] for index in range(16)})
    assert len(set(found.values())) == 16


def test_any_flipped_bit_changes_it():
    values = _values("float32")
    arrays = {"original": jnp.asarray(values)}
    for trial in range(64):
        changed = values.copy()
        changed.view(np.uint32).reshape(-1)[(trial * 37) % changed.size] ^= np.uint32(1 << (trial % 32))
        arrays[str(trial)] = jnp.asarray(changed)
    found = fingerprints(arrays)
    assert all(found[str(trial)] != found["original"] for trial in range(64))


def test_moving_elements_changes_it():
    values = _values("float32", (6, 6))
    found = fingerprints(
        {
            "original": jnp.asarray(values),
            "transposed": jnp.asarray(values.T),
            "reversed": jnp.asarray(values[::-1]),
            "swapped": jnp.asarray(values[[1, 0, 2, 3, 4, 5]]),
        }
    )
    assert len(set(found.values())) == 4


def test_the_number_of_zeros_counts():
    found = fingerprints({str(size): jnp.zeros(size) for size in (0, 1, 7, 8, 64)})
    assert len(set(found.values())) == 5


def test_scalars_and_all_bit_patterns_of_bfloat16_differ():
    every = np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16)
    scalars = {str(index): jnp.asarray(every[index]) for index in itertools.chain(range(0, 2**16, 4099))}
    found = fingerprints(scalars)
    assert len(set(found.values())) == len(scalars)


def test_not_a_number_and_negative_zero_keep_their_bits():
    bits = np.array([0x00000000, 0x80000000, 0x7FC00000, 0x7FC00001], np.uint32)
    found = fingerprints({str(index): jnp.asarray(bits[index : index + 1].view(np.float32)) for index in range(4)})
    assert len(set(found.values())) == 4
