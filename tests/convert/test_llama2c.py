"""Files of llama2.c of version 1, written here as its export.py does: the right tensors, or one line."""

import pathlib
import struct

import numpy as np
import pytest

from t5x_like import __main__ as program
from tests.convert import native

WIDTH, MLP, LAYERS, HEADS, KV_HEADS, VOCAB, LENGTH = 16, 24, 3, 4, 2, 11, 32
HEAD = WIDTH // HEADS
_MAGIC = 0x616B3432  # "ak42"
_SHAPES = {
    "attention_norm": (LAYERS, WIDTH),
    "ffn_norm": (LAYERS, WIDTH),
    "norm": (WIDTH,),
    "tok_embeddings": (VOCAB, WIDTH),
    "wq": (LAYERS, WIDTH, WIDTH),
    "wk": (LAYERS, KV_HEADS * HEAD, WIDTH),
    "wv": (LAYERS, KV_HEADS * HEAD, WIDTH),
    "wo": (LAYERS, WIDTH, WIDTH),
    "w1": (LAYERS, MLP, WIDTH),
    "w2": (LAYERS, WIDTH, MLP),
    "w3": (LAYERS, MLP, WIDTH),
    "output": (VOCAB, WIDTH),
}


def _tensors(*, tied: bool) -> dict[str, np.ndarray]:
    """In the order of the file."""
    random = np.random.default_rng(0)
    names = [name for name in _SHAPES if not (tied and name == "output")]
    return {name: random.standard_normal(_SHAPES[name]).astype(np.float32) for name in names}


def _file(*, tied: bool, magic: int = _MAGIC) -> bytes:
    numbers = (WIDTH, MLP, LAYERS, HEADS, KV_HEADS, VOCAB, LENGTH)
    header = struct.pack("<Ii7iB", magic, 1, *numbers, tied).ljust(256, b"\0")
    return header + b"".join(array.tobytes() for array in _tensors(tied=tied).values())


def _halves(weights: np.ndarray) -> np.ndarray:
    """[layer, out, in] whose heads turn neighbours (2i, 2i+1), as ours [layer, in, head, place], which turn halves."""
    order = [*range(0, HEAD, 2), *range(1, HEAD, 2)]
    heads = [weights[:, begin : begin + HEAD][:, order] for begin in range(0, weights.shape[1], HEAD)]
    return np.stack(heads, axis=1).transpose(0, 3, 1, 2)


def _expected(*, tied: bool) -> dict[str, np.ndarray]:
    theirs = _tensors(tied=tied)
    found = {
        "embed/tokens": theirs["tok_embeddings"],
        "layers/attention_norm/scale": theirs["attention_norm"],
        "layers/mlp_norm/scale": theirs["ffn_norm"],
        "final_norm/scale": theirs["norm"],
        "layers/attention/q": _halves(theirs["wq"]),
        "layers/attention/k": _halves(theirs["wk"]),
        "layers/attention/v": theirs["wv"].swapaxes(1, 2).reshape(LAYERS, WIDTH, KV_HEADS, HEAD),
        "layers/attention/o": theirs["wo"].swapaxes(1, 2).reshape(LAYERS, HEADS, HEAD, WIDTH),
        "layers/mlp/gate": theirs["w1"].swapaxes(1, 2),
        "layers/mlp/down": theirs["w2"].swapaxes(1, 2),
        "layers/mlp/up": theirs["w3"].swapaxes(1, 2),
    }
    return found if tied else found | {"head/weight": theirs["output"]}


@pytest.mark.parametrize("tied", [True, False])
def test_version_1_gives_the_right_tensors(tied, tmp_path):
    (tmp_path / "model.bin").write_bytes(_file(tied=tied))
    assert program.main(["convert", str(tmp_path / "model.bin"), str(tmp_path / "ours")]) == 0
    found, expected = native.leaves(tmp_path / "ours"), _expected(tied=tied)
    assert found.keys() == expected.keys()
    for path, array in found.items():
        if path in ("embed/tokens", "head/weight"):  # rows that pad the vocabulary
            assert len(array) == 128 and not array[VOCAB:].any()
            array = array[:VOCAB]
        np.testing.assert_array_equal(array, expected[path], err_msg=path)


_WHOLE = _file(tied=True)
FAULTS = {
    "other magic": (_file(tied=True, magic=0x61_6B_34_33), "is no llama2.c checkpoint: its first numbers are"),
    "magic in the other order": (b"ak42" + _WHOLE[4:], "is no llama2.c checkpoint: its first numbers are"),
    "ends in the header": (_WHOLE[:200], "is no llama2.c checkpoint of version 0 or 1"),
    "ends after the header": (_WHOLE[:256], f"has 256 bytes, expected {len(_WHOLE):,} by its header"),
    "ends in the last tensor": (_WHOLE[:-4], f"has {len(_WHOLE) - 4:,} bytes, expected {len(_WHOLE):,} by its header"),
    "too long": (_WHOLE + bytes(4), f"has {len(_WHOLE) + 4:,} bytes, expected {len(_WHOLE):,} by its header"),
    "no heads": (_WHOLE[:20] + bytes(4) + _WHOLE[24:], "its first numbers are [16, 24, 3, 0, 2, 11, 32]"),
    "nan": (_WHOLE[:256] + struct.pack("<f", np.nan) + _WHOLE[260:], "'attention_norm.0' holds NaN or infinity"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_file_is_one_line_and_leaves_nothing(name, tmp_path, capsys):
    content, expected = FAULTS[name]
    place: pathlib.Path = tmp_path / "model.bin"
    place.write_bytes(content)
    assert program.main(["convert", str(place), str(tmp_path / "ours")]) == 1
    printed = capsys.readouterr().err
    assert expected in printed and str(place) in printed and printed.count("\n") == 1, printed
    assert [path.name for path in tmp_path.iterdir()] == ["model.bin"]
