"""Prints what any version of transformers, torch or not, reads of a Hugging Face folder, as one JSON object.

    python read_with_transformers.py FOLDER

Needs transformers, safetensors and numpy alone, so that it runs in an environment of another version.
"""

import json
import pathlib
import sys

import transformers
from safetensors.numpy import load_file

_FIELDS = (
    *("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *(
        "head_dim",
        "intermediate_size",
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
        "bos_token_id",
    ),
    *("eos_token_id", "n_inner", "layer_norm_epsilon", "d_kv", "feed_forward_proj", "decoder_start_token_id"),
)


def read(folder: pathlib.Path) -> dict:
    config = transformers.AutoConfig.from_pretrained(folder)
    old, new = getattr(config, "rope_scaling", None), getattr(config, "rope_parameters", None)
    rope = dict(new or old or {})
    rope.setdefault("rope_theta", getattr(config, "rope_theta", None))
    rope.setdefault("rope_type", "default")
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= {name: [list(value.shape), value.dtype.name] for name, value in load_file(file).items()}
    tokens = None
    if (folder / "tokenizer.json").exists():
        tokens = transformers.AutoTokenizer.from_pretrained(folder)("Once upon a time")["input_ids"]
    return {
        "config": {name: getattr(config, name, None) for name in _FIELDS},
        "rope": dict(sorted(rope.items())),
        "dtype": str(getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)).removeprefix("torch."),
        "tokens": tokens,
        "tensors": tensors,
    }


if __name__ == "__main__":
    print(json.dumps({"version": transformers.__version__, **read(pathlib.Path(sys.argv[1]))}))
