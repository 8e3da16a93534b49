"""Files of llama2.c and T5X, and models of ours: read, sent back, and the same text and logits."""

import json
import pathlib

import numpy as np
import pytest

import t5x_like
from t5x_like.convert import convert
from t5x_like.convert.layout import Span
from t5x_like.convert.safetensors import open_file
from tests.models import stories

STORIES = stories.DIRECTORY


def _write_bin(path: pathlib.Path) -> None:
    """stories260K as llama2.c stores it (version 0): pairs of a head turn as neighbours."""
    c = json.loads((STORIES / "config.json").read_text())
    numbers = [c[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")]
    numbers += [c["num_key_value_heads"], c["vocab_size"], c["max_position_embeddings"]]
    with open_file(str(STORIES / "model.safetensors")) as tensors:

        def get(name: str) -> np.ndarray:
            shape = tensors.described()[name][0]
            return tensors.read(name, Span(shape, tuple((0, size) for size in shape)))

        def layers(name: str, heads: int = 0) -> np.ndarray:
            found = [get(f"model.layers.{layer}.{name}.weight") for layer in range(c["num_hidden_layers"])]
            if heads:  # from halves to neighbours
                found = [w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape) for w in found]
            return np.concatenate([each.ravel() for each in found])

        angles = np.zeros(c["max_position_embeddings"] * c["head_dim"], np.float32)
        parts = [
            get("model.embed_tokens.weight").ravel(),
            layers("input_layernorm"),
            layers("self_attn.q_proj", c["num_attention_heads"]),
            layers("self_attn.k_proj", c["num_key_value_heads"]),
            *(layers(f"self_attn.{name}_proj") for name in "vo"),
            layers("post_attention_layernorm"),
            *(layers(f"mlp.{name}_proj") for name in ("gate", "down", "up")),
            get("model.norm.weight"),
            angles,
        ]
    path.write_bytes(np.array(numbers, np.int32).tobytes() + np.concatenate(parts).tobytes())


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> pathlib.Path:
    """stories260K of a .bin file as a model directory."""
    folder = tmp_path_factory.mktemp("bin")
    _write_bin(folder / "stories.bin")
    (folder / "tokenizer.json").write_bytes((STORIES / "tokenizer.json").read_bytes())
    convert.to_native(str(folder / "stories.bin"), str(folder / "native"))
    return folder / "native"


@pytest.mark.parametrize("form", ["native", "hugging face"])
def test_the_published_story_is_told(native, form):
    expected = json.loads((STORIES / "expected_greedy.json").read_text())
    model = t5x_like.load(native if form == "native" else STORIES)
    text = model.generate("", max_new_tokens=expected["max_new_tokens"], temperature=0)[0]
    assert text == expected["expected_stdout"].strip() and len(text) > 400


def test_a_bin_file_goes_on_to_hugging_face_with_the_same_bits(native, tmp_path):
    convert.to_huggingface(str(native), str(tmp_path / "theirs"))
    with (
        open_file(str(STORIES / "model.safetensors")) as one,
        open_file(str(tmp_path / "theirs/model.safetensors")) as two,
    ):
        assert one.described() == two.described()
        for name, (shape, _) in one.described().items():
            whole = Span(shape, tuple((0, size) for size in shape))
            assert one.read(name, whole).tobytes() == two.read(name, whole).tobytes(), name
    settings = json.loads((tmp_path / "theirs" / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"]) == ("<s>", "</s>")


def test_shards_hold_one_model(native, tmp_path):
    convert.to_huggingface(str(native), str(tmp_path / "theirs"), shard_bytes=400_000)
    assert len(list((tmp_path / "theirs").glob("model-*-of-*.safetensors"))) > 2
    one, two = t5x_like.load(tmp_path / "theirs"), t5x_like.load(native)
    ids = np.arange(20)[None]
    np.testing.assert_array_equal(one.logits(ids), two.logits(ids))
