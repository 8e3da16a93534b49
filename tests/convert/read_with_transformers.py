"""Prints what any version of transformers, torch or not, reads of folders of Hugging Face, as one JSON object by name.

    python read_with_transformers.py FOLDER ...

Needs transformers, safetensors and numpy alone, so that it runs in an environment of another version.
"""

import json
import pathlib
import sys

import transformers
from safetensors import safe_open

_FIELDS = (
    *("model_type", "architectures", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "intermediate_size", "hidden_act", "rms_norm_eps", "max_position_embeddings"),
    *("attention_bias", "mlp_bias", "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("n_inner", "n_embd", "n_head", "n_positions", "layer_norm_epsilon", "activation_function", "d_kv", "d_ff"),
    *("feed_forward_proj", "dense_act_fn", "is_gated_act", "num_layers", "num_decoder_layers"),
    *("relative_attention_num_buckets", "relative_attention_max_distance", "is_encoder_decoder"),
)
_TEXTS = ("Once upon a time", "  two spaces\nand a line", "caf\u00e9 \u4e16\u754c", "")
_GENERATION = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def read(folder: pathlib.Path) -> dict:
    config = transformers.AutoConfig.from_pretrained(folder)
    generation = transformers.GenerationConfig.from_pretrained(folder)
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():
                described = opened.get_slice(name)
                tensors[name] = [described.get_shape(), described.get_dtype()]
    return {
        "config": {name: getattr(config, name, None) for name in _FIELDS},
        "rope": _rope(config),
        "head": _head(config, "lm_head.weight" in tensors),
        "dtype": str(getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)).removeprefix("torch."),
        "generation": {name: getattr(generation, name, None) for name in _GENERATION},
        "tokens": _tokens(folder),
        "tensors": tensors,
    }


def _rope(config: transformers.PretrainedConfig) -> dict:
    """Version 5 has one field where version 4 has two."""
    old, new = getattr(config, "rope_scaling", None), getattr(config, "rope_parameters", None)
    rope = dict(new or old or {})
    rope.setdefault("rope_theta", getattr(config, "rope_theta", None))
    rope.setdefault("rope_type", "default")
    return dict(sorted(rope.items()))


def _head(config: transformers.PretrainedConfig, own: bool) -> dict:
    """What each version's forward does. T5 of version 4 goes by `tie_word_embeddings` alone: it ties and scales, or
    does neither; that of version 5 takes the head of the file where it has one."""
    tied = config.tie_word_embeddings
    if config.model_type != "t5":
        return {"tied": tied}
    version_5 = int(transformers.__version__.split(".")[0]) >= 5
    return {"own": own, "scaled": config.scale_decoder_outputs if version_5 else tied}


def _tokens(folder: pathlib.Path) -> list | None:
    if not any((folder / name).exists() for name in ("tokenizer.json", "spiece.model", "tokenizer_config.json")):
        return None
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text)["input_ids"] for text in _TEXTS]
    read = [[text, each, tokenizer.decode(each)] for text, each in zip(_TEXTS, ids, strict=True)]
    return read + [tokenizer.bos_token_id, tokenizer.eos_token_id]


if __name__ == "__main__":
    print(json.dumps({name: read(pathlib.Path(name)) for name in sys.argv[1:]}))
