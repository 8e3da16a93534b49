"""Leaves written and read a piece at a time are the checkpoints that Orbax and `reading.restore` know."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from t5x_like.core import tree
from t5x_like.storage import fingerprint, model_directory, streams
from t5x_like.storage.checkpoint import Checkpoints
from t5x_like.storage.reading import restore

_SHAPES = {"layers/up": (3, 10, 7), "embed": (33, 5), "norm": (9,)}


def _arrays(dtype: str) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {path: np.asarray(jnp.asarray(random.standard_normal(shape), dtype)) for path, shape in _SHAPES.items()}


def _write(checkpoint: str, arrays: dict[str, np.ndarray]) -> None:
    chunks = {"layers/up": (1, 4, 7), "embed": (8, 5), "norm": (9,)}
    writer = streams.ItemWriter(
        f"{checkpoint}/params", {path: (a.shape, a.dtype, chunks[path]) for path, a in arrays.items()}
    )
    sums = dict.fromkeys(arrays, 0)
    for path, leaf in writer.leaves.items():
        for region in streams.chunks(leaf.shape, leaf.chunk):
            piece = arrays[path][tuple(slice(*span) for span in region)]
            leaf.write(region, piece)
            sums[path] += fingerprint.part(piece, [begin for begin, _ in region], leaf.shape)
    note = model_directory.note(
        step=0,
        arrays={"params": {p: {"shape": list(a.shape), "dtype": a.dtype.name} for p, a in arrays.items()}},
        kinds={"params": {}},
        fingerprints={"params": {path: value % 2**32 for path, value in sums.items()}},
        metrics={},
        metadata={},
    )
    streams.write_note(checkpoint, note)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_in_pieces_is_restored_and_verified(dtype, tmp_path):
    arrays = _arrays(dtype)
    _write(str(tmp_path / "0"), arrays)
    templates = {path: jax.ShapeDtypeStruct(a.shape, a.dtype) for path, a in arrays.items()}
    found = tree.flatten(restore(str(tmp_path / "0"), {"params": tree.unflatten(templates)})["params"])
    as_numpy = tree.unflatten({path: ocp.RestoreArgs(restore_type=np.ndarray) for path in arrays})
    plain = tree.flatten(ocp.PyTreeCheckpointer().restore(tmp_path / "0" / "params", restore_args=as_numpy))
    for path, array in arrays.items():
        assert np.asarray(found[path]).tobytes() == array.tobytes() == np.asarray(plain[path]).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_orbax_wrote_is_read_in_pieces(dtype, tmp_path):
    arrays = _arrays(dtype)
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(1, {"params": tree.unflatten({p: jnp.asarray(a) for p, a in arrays.items()})}, {})
    for path, leaf in streams.read_item(str(tmp_path / "1"), "params").items():
        region = tuple((size // 3, size) for size in leaf.shape)
        expected = arrays[path][tuple(slice(*span) for span in region)]
        assert leaf.dtype == expected.dtype and leaf.read(region).tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("shape, chunk", [((5, 6, 70), (2, 4, 70)), ((3, 40), (3, 11)), ((1000,), (64,)), ((), ())])
def test_parts_of_a_fingerprint_add_up_to_that_of_the_whole(dtype, shape, chunk, monkeypatch):
    monkeypatch.setattr(fingerprint, "_BLOCK", 64)  # so that blocks end within pieces
    array = np.asarray(jnp.asarray(np.random.default_rng(0).standard_normal(shape) * 9, dtype))
    total = 0
    for region in streams.chunks(shape, chunk):
        piece = array[tuple(slice(*span) for span in region)]
        total += fingerprint.part(piece, [begin for begin, _ in region], shape)
    assert total % 2**32 == fingerprint.fingerprints({"whole": jnp.asarray(array)})["whole"]
