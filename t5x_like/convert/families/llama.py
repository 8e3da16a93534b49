"""Llama: `config.json` and tensors of transformers' LlamaForCausalLM, and ours.

A model with a scalar head is LlamaForSequenceClassification with one label, whose `score` is the head. That class has
no LM head; ours is written beside it all the same, and taken for the embedding where it is not there.

Matrices are stored [out, in] there. Queries and keys are turned in halves, as ours are, so nothing is permuted.
"""

from typing import Any

from t5x_like.convert.mapping import Row, Table
from t5x_like.convert.settings import Settings, activation_name, require_usual, rope_settings
from t5x_like.models.config import ModelConfig

_LAYER = "model.layers.{layer}."


def table(config: ModelConfig) -> Table:
    stack = config.decoder
    assert stack is not None
    rows = [
        Row("model.embed_tokens.weight", "embed/tokens"),
        Row(_LAYER + "input_layernorm.weight", "layers/attention_norm/scale"),
        Row(_LAYER + "self_attn.q_proj.weight", "layers/attention/q", "(N H) D -> D N H"),
        Row(_LAYER + "self_attn.k_proj.weight", "layers/attention/k", "(K H) D -> D K H"),
        Row(_LAYER + "self_attn.v_proj.weight", "layers/attention/v", "(K H) D -> D K H"),
        Row(_LAYER + "self_attn.o_proj.weight", "layers/attention/o", "D (N H) -> N H D"),
        Row(_LAYER + "post_attention_layernorm.weight", "layers/mlp_norm/scale"),
        Row(_LAYER + "mlp.gate_proj.weight", "layers/mlp/gate", "F D -> D F"),
        Row(_LAYER + "mlp.up_proj.weight", "layers/mlp/up", "F D -> D F"),
        Row(_LAYER + "mlp.down_proj.weight", "layers/mlp/down", "D F -> F D"),
        Row("model.norm.weight", "final_norm/scale"),
    ]
    if stack.qkv_bias:
        rows += [
            Row(_LAYER + f"self_attn.{name}_proj.bias", f"layers/attention/{name}_bias", "(N H) -> N H")
            for name in "qkv"
        ]
    if stack.out_bias:
        rows += [Row(_LAYER + "self_attn.o_proj.bias", "layers/attention/o_bias")]
    if stack.mlp_bias:
        rows += [Row(_LAYER + f"mlp.{name}_proj.bias", f"layers/mlp/{name}_bias") for name in ("gate", "up", "down")]
    if not config.head.tied:
        rows += [Row("lm_head.weight", "head/weight")]
    rows += [
        Row("score.weight", f"heads/{name}/weight", "one D -> (one D)", {"one": 1}) for name in config.scalar_heads
    ]
    copies = {"lm_head.weight": "model.embed_tokens.weight"} if config.head.tied else {}
    return Table(rows, (r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq",), copies, prefix="model.")


def section(s: Settings) -> dict[str, Any]:
    bias = s.get("attention_bias", False)
    biases = {"qkv_bias": bias, "out_bias": bias, "mlp_bias": s.get("mlp_bias", False)}
    found = sizes(s)
    return found | {"decoder": found["decoder"] | biases}


def sizes(s: Settings) -> dict[str, Any]:
    """What families that are like Llama give alike: all but biases."""
    heads, width = s.number("num_attention_heads"), s.number("hidden_size")
    scores = "score.weight" in s.tensors
    return ({"scalar_heads": ("reward",)} if scores else {}) | {
        "vocab_size": s.number("vocab_size"),
        "max_length": s.number("max_position_embeddings"),
        "width": width,
        "decoder": {
            "layers": s.number("num_hidden_layers"),
            "heads": heads,
            "kv_heads": s.number("num_key_value_heads", heads),
            "head_size": s.number("head_dim", width // heads),
            "mlp": s.number("intermediate_size"),
            "norm_epsilon": s.get("rms_norm_eps", 1e-6),
            "activation": s.activation("hidden_act", "silu"),
            "rope": s.rope(),
        },
        "head": {"tied": s.get("tie_word_embeddings", False) or (scores and "lm_head.weight" not in s.tensors)},
        "init": {"std": s.get("initializer_range", 0.02)},
    }


def settings(config: ModelConfig) -> dict[str, Any]:
    d = config.decoder
    assert d is not None
    free = (
        "norm_epsilon",
        "activation",
        "rope",
        "mlp_bias",
        *(("qkv_bias", "out_bias") if d.qkv_bias == d.out_bias else ()),
    )
    require_usual(config, free=("head.tied", "init", "scalar_heads", *(f"decoder.{name}" for name in free)))
    biases = {"attention_bias": d.qkv_bias, "mlp_bias": d.mlp_bias}
    return size_settings(config) | biases | {"pretraining_tp": 1}


def size_settings(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `sizes`."""
    d = config.decoder
    assert d is not None
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "num_hidden_layers": d.layers,
        "hidden_size": config.width,
        "num_attention_heads": d.heads,
        "num_key_value_heads": d.kv_heads,
        "head_dim": d.head_size,
        "intermediate_size": d.mlp,
        "rms_norm_eps": d.norm_epsilon,
        "hidden_act": activation_name(d.activation),
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.head.tied,
        "initializer_range": config.init.std,
        **rope_settings(d.rope.theta, d.rope.scaling),
    }
