"""The trained stories260K of tests/data as a native model: reads its Hugging Face files with numpy alone."""

import json
import pathlib
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from t5x_like.core.dtypes import DtypePolicy
from t5x_like.models.config import ModelConfig, resolve
from t5x_like.models.model import Model
from t5x_like.parallel.rules import rules
from tests.models import cases

DIRECTORY = pathlib.Path(__file__).parents[1] / "data" / "stories260K"


def config() -> ModelConfig:
    theirs = json.loads((DIRECTORY / "config.json").read_text())
    return resolve(
        cases.section(
            family="llama",
            size="custom",
            layers=theirs["num_hidden_layers"],
            width=theirs["hidden_size"],
            heads=theirs["num_attention_heads"],
            kv_heads=theirs["num_key_value_heads"],
            head_size=theirs["head_dim"],
            mlp=theirs["intermediate_size"],
            vocab_size=theirs["vocab_size"],
            max_length=theirs["max_position_embeddings"],
            norm_epsilon=theirs["rms_norm_eps"],
            tied=theirs["tie_word_embeddings"],
        )
    )


def model() -> Model:
    return Model(config(), rules(), DtypePolicy("float32", "float32"))


def params() -> dict[str, Any]:
    model, tensors = config(), load_file(DIRECTORY / "model.safetensors")
    c = model.decoder

    def layers(name: str, *shape: int) -> np.ndarray:
        """All layers of one weight; a matrix is stored [out, in] and turned."""
        stack = np.stack([tensors[f"model.layers.{i}.{name}.weight"] for i in range(c.layers)])
        return stack.swapaxes(1, 2).reshape(c.layers, *shape) if shape else stack

    return {
        "embed": {"tokens": tensors["model.embed_tokens.weight"]},
        "final_norm": {"scale": tensors["model.norm.weight"]},
        "layers": {
            "attention_norm": {"scale": layers("input_layernorm")},
            "mlp_norm": {"scale": layers("post_attention_layernorm")},
            "attention": {
                "q": layers("self_attn.q_proj", model.width, c.heads, c.head_size),
                "k": layers("self_attn.k_proj", model.width, c.kv_heads, c.head_size),
                "v": layers("self_attn.v_proj", model.width, c.kv_heads, c.head_size),
                "o": layers("self_attn.o_proj", c.heads, c.head_size, model.width),
            },
            "mlp": {
                "gate": layers("mlp.gate_proj", model.width, c.mlp),
                "up": layers("mlp.up_proj", model.width, c.mlp),
                "down": layers("mlp.down_proj", c.mlp, model.width),
            },
        },
    }


def expected_ids() -> list[int]:
    """BOS and the 200 tokens of its greedy continuation, as llama2.c publishes them."""
    return json.loads((DIRECTORY / "expected_greedy.json").read_text())["token_ids"]
