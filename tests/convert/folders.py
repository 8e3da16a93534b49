"""Small random models of transformers, saved as folders, for the tests of conversion."""

import json
import pathlib
import shutil
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

STORIES = pathlib.Path(__file__).parents[1] / "data" / "stories260K"
_LLAMA = {
    "vocab_size": 517,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_GPT2 = {"vocab_size": 517, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 192}
T5 = {
    "vocab_size": 517,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 40,
    "n_positions": 256,
    "decoder_start_token_id": 0,
}

# Name -> (class of transformers without the ending, fields of its config).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _LLAMA),
    "llama_one_layer_tied": ("Llama", _LLAMA | {"num_hidden_layers": 1, "tie_word_embeddings": True}),
    "llama_grouped": ("Llama", _LLAMA | {"num_key_value_heads": 2, "head_dim": 12}),
    "llama_scaled_rope": ("Llama", _LLAMA | {"num_key_value_heads": 1, "rope_parameters": _LLAMA3}),
    "llama_biases": ("Llama", _LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", _LLAMA | {"num_key_value_heads": 2, "rope_parameters": _YARN}),
    "gpt2": ("GPT2", _GPT2),
    "gpt2_untied_one_layer": ("GPT2", _GPT2 | {"tie_word_embeddings": False, "n_layer": 1, "n_inner": 40}),
    "t5": ("T5", T5 | {"feed_forward_proj": "relu"}),
    "t5_gated": ("T5", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
}
_CLASSES = {
    "Llama": "LlamaForCausalLM",
    "Qwen2": "Qwen2ForCausalLM",
    "GPT2": "GPT2LMHeadModel",
    "T5": "T5ForConditionalGeneration",
}


def build(name: str) -> torch.nn.Module:
    """Random weights away from zero, norms away from one and biases from zero."""
    kind, fields = CASES[name]
    return randomized(getattr(transformers, _CLASSES[kind])(getattr(transformers, f"{kind}Config")(**fields)))


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.15 * noise if parameter.ndim > 1 else parameter + 0.3 * noise)
    return model.eval()


def save(name: str, folder: pathlib.Path, *, dtype: str = "float32", max_shard_size: str = "5GB") -> torch.nn.Module:
    """Saves a model with the tokenizer of stories260K beside it, and returns it."""
    model = build(name).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if name == "t5_gated":
        _with_own_head(folder, model)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(STORIES / file, folder / file)
    return model


def _with_own_head(folder: pathlib.Path, model: torch.nn.Module) -> None:
    """As T5 1.1 is published: transformers 5 ties every T5 that it makes, and reads a head of its own from a file."""
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["shared.weight"].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings.pop("scale_decoder_outputs", None)
    (folder / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": False}))
