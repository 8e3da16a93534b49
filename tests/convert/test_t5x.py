"""Checkpoints of T5X before Orbax, written here by flax and TensorStore as T5X did: the right tensors, or one line."""

import pathlib
import shutil

import numpy as np
import pytest
import tensorstore as ts
from flax.serialization import msgpack_serialize

from t5x_like import __main__ as program
from tests.convert import native

WIDTH, HEADS, HEAD, MLP, BUCKETS, VOCAB = 8, 2, 6, 12, 4, 13
INNER = HEADS * HEAD
LAYERS = {"encoder": 2, "decoder": 3}
# Theirs -> (the norm before it, ours).
BRANCHES = {
    "encoder": {"attention": ("pre_attention_layer_norm", "attention")},
    "decoder": {
        "self_attention": ("pre_self_attention_layer_norm", "attention"),
        "encoder_decoder_attention": ("pre_cross_attention_layer_norm", "cross"),
    },
}


def _arrays(*, gated: bool) -> dict[str, np.ndarray]:
    """The parameters by T5X's names. Gated is T5 1.1, whose head is its own; else 1.0, whose head is tied."""
    shapes: dict[str, tuple[int, ...]] = {"token_embedder/embedding": (VOCAB, WIDTH)}
    for stack, count in LAYERS.items():
        shapes[f"{stack}/relpos_bias/rel_embedding"] = (HEADS, BUCKETS)
        shapes[f"{stack}/{stack}_norm/scale"] = (WIDTH,)
        for layer in (f"{stack}/layers_{number}" for number in range(count)):
            for branch, (norm, _) in BRANCHES[stack].items():
                shapes[f"{layer}/{norm}/scale"] = (WIDTH,)
                shapes |= {f"{layer}/{branch}/{part}/kernel": (WIDTH, INNER) for part in ("query", "key", "value")}
                shapes[f"{layer}/{branch}/out/kernel"] = (INNER, WIDTH)
            shapes[f"{layer}/pre_mlp_layer_norm/scale"] = (WIDTH,)
            shapes |= {f"{layer}/mlp/{part}/kernel": (WIDTH, MLP) for part in (("wi_0", "wi_1") if gated else ("wi",))}
            shapes[f"{layer}/mlp/wo/kernel"] = (MLP, WIDTH)
    if gated:
        shapes["decoder/logits_dense/kernel"] = (WIDTH, VOCAB)
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def _expected(theirs: dict[str, np.ndarray], *, gated: bool) -> dict[str, np.ndarray]:
    """The same by our names; layers are one array."""
    found = {"embed/tokens": theirs["token_embedder/embedding"]}
    for stack, count in LAYERS.items():

        def layers(name: str, *shape: int, stack=stack, count=count) -> np.ndarray:
            stacked = np.stack([theirs[f"{stack}/layers_{number}/{name}"] for number in range(count)])
            return stacked.reshape(count, *shape) if shape else stacked

        found[f"{stack}/relative_bias/table"] = theirs[f"{stack}/relpos_bias/rel_embedding"].T
        found[f"{stack}/final_norm/scale"] = theirs[f"{stack}/{stack}_norm/scale"]
        for branch, (norm, ours) in BRANCHES[stack].items():
            path = f"{stack}/layers/{ours}"
            found[f"{path}_norm/scale"] = layers(f"{norm}/scale")
            for part, name in {"q": "query", "k": "key", "v": "value"}.items():
                found[f"{path}/{part}"] = layers(f"{branch}/{name}/kernel", WIDTH, HEADS, HEAD)
            found[f"{path}/o"] = layers(f"{branch}/out/kernel", HEADS, HEAD, WIDTH)
        found[f"{stack}/layers/mlp_norm/scale"] = layers("pre_mlp_layer_norm/scale")
        for ours, name in ({"gate": "wi_0", "up": "wi_1"} if gated else {"up": "wi"}).items():
            found[f"{stack}/layers/mlp/{ours}"] = layers(f"mlp/{name}/kernel")
        found[f"{stack}/layers/mlp/down"] = layers("mlp/wo/kernel")
    return found | ({"head/weight": theirs["decoder/logits_dense/kernel"].T} if gated else {})


def _write(folder: pathlib.Path, arrays: dict[str, np.ndarray], *, zarr: bool) -> None:
    """zarr: matrices lie beside the msgpack, compressed and in several chunks."""
    folder.mkdir()
    target: dict[str, object] = dict(arrays)
    for name in [name for name, array in arrays.items() if zarr and array.ndim == 2]:
        place = f"target.{name.replace('/', '.')}"
        rows, columns = arrays[name].shape
        metadata = {"compressor": {"id": "gzip", "level": 1}, "chunks": [max(1, rows // 2), columns]}
        kvstore = {"driver": "file", "path": f"{folder / place}/"}
        spec = {"driver": "zarr", "kvstore": kvstore, "metadata": metadata}
        store = ts.open(spec, create=True, dtype=ts.float32, shape=list(arrays[name].shape)).result()
        store.write(arrays[name]).result()
        target[name] = {"driver": "zarr", "kvstore": {"driver": "file", "path": place}, "metadata": {}}
    optimizer = {"state": {"step": np.int32(7)}, "target": _nested(target)}
    (folder / "checkpoint").write_bytes(msgpack_serialize({"version": 3, "optimizer": optimizer}))


def _nested(flat: dict[str, object]) -> dict[str, object]:
    found: dict = {}
    for name, value in flat.items():
        *above, last = name.split("/")
        node = found
        for each in above:
            node = node.setdefault(each, {})
        node[last] = value
    return found


@pytest.mark.parametrize("zarr", [True, False], ids=["zarr", "msgpack"])
@pytest.mark.parametrize("gated", [True, False], ids=["1.1", "1.0"])
def test_it_gives_the_right_tensors(gated, zarr, tmp_path):
    arrays = _arrays(gated=gated)
    _write(tmp_path / "theirs", arrays, zarr=zarr)
    source = tmp_path / "theirs" if zarr else tmp_path / "theirs" / "checkpoint"
    assert program.main(["convert", str(source), str(tmp_path / "ours")]) == 0
    found, expected = native.leaves(tmp_path / "ours"), _expected(arrays, gated=gated)
    assert found.keys() == expected.keys()
    for path, array in found.items():
        if path in ("embed/tokens", "head/weight"):  # rows that pad the vocabulary
            assert len(array) == 128 and not array[VOCAB:].any()
            array = array[:VOCAB]
        np.testing.assert_array_equal(array, expected[path], err_msg=path)


_WO, _BIASES = "decoder/layers_1/mlp/wo/kernel", "encoder/relpos_bias/rel_embedding"


def _missing(name: str):
    return lambda arrays: arrays.pop(name)


def _with(name: str, value: np.ndarray):
    return lambda arrays: arrays.update({name: value})


FAULTS = {
    "missing": (_missing(_WO), f"'{_WO}' is missing"),
    "missing that says sizes": (_missing(_BIASES), f"'{_BIASES}' is missing"),
    "misshapen": (_with(_WO, np.ones((WIDTH, MLP), np.float32)), f"'{_WO}' has the shape [8, 12], expected [12, 8]"),
    "misshapen that says sizes": (_with(_BIASES, np.ones(4, np.float32)), f"'{_BIASES}' has the shape [4], expected"),
    "empty": (_with(_BIASES, np.ones((0, 4), np.float32)), f"'{_BIASES}' has the shape [0, 4], expected"),
    "unknown": (_with("decoder/layers_1/extra/scale", np.ones(2, np.float32)), "'decoder/layers_1/extra/scale' is unk"),
    "of other numbers": (_with(_WO, np.ones((MLP, WIDTH), np.int8)), f"'{_WO}' is stored as int8"),
    "nan": (_with(_WO, np.full((MLP, WIDTH), np.nan, np.float32)), f"'{_WO}' holds NaN or infinity"),
}


def _refused(source: pathlib.Path, expected: str, capsys) -> None:
    assert program.main(["convert", str(source), str(source.parent / "ours")]) == 1
    printed = capsys.readouterr().err
    assert expected in printed and str(source) in printed and printed.count("\n") == 1, printed
    assert [path.name for path in source.parent.iterdir()] == [source.name]


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_array_is_one_line_and_leaves_nothing(name, tmp_path, capsys):
    change, expected = FAULTS[name]
    arrays = _arrays(gated=True)
    change(arrays)
    _write(tmp_path / "theirs", arrays, zarr=False)
    _refused(tmp_path / "theirs", expected, capsys)


def _cut_chunk(folder: pathlib.Path) -> None:
    place = folder / f"target.{_WO.replace('/', '.')}" / "1.0"
    place.write_bytes(place.read_bytes()[:-9])


def _cut_file(folder: pathlib.Path) -> None:
    place = folder / "checkpoint"
    place.write_bytes(place.read_bytes()[:-9])


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda folder: shutil.rmtree(folder / f"target.{_WO.replace('/', '.')}"), "is no zarr array"),
        (_cut_chunk, f"'{_WO}' cannot be read"),
        (_cut_file, "is no whole T5X checkpoint"),
    ],
    ids=["no folder", "truncated chunk", "truncated file"],
)
def test_what_was_not_copied_whole_is_one_line(change, expected, tmp_path, capsys):
    _write(tmp_path / "theirs", _arrays(gated=True), zarr=True)
    change(tmp_path / "theirs")
    _refused(tmp_path / "theirs", expected, capsys)
