"""Llama: `config.json` and tensors of transformers' LlamaForCausalLM, and ours.

Matrices are stored [out, in] there. Queries and keys are turned in halves, as ours are, so nothing is permuted.
"""

from typing import Any

from t5x_like.convert.settings import Settings, activation_name, only, rope_settings
from t5x_like.convert.mapping import Row, Table
from t5x_like.models.config import ModelConfig

_LAYER = "model.layers.{layer}."


def table(config: ModelConfig) -> Table:
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
    if config.qkv_bias:
        rows += [
            Row(_LAYER + f"self_attn.{name}_proj.bias", f"layers/attention/{name}_bias", "(N H) -> N H")
            for name in "qkv"
        ]
    if config.out_bias:
        rows += [Row(_LAYER + "self_attn.o_proj.bias", "layers/attention/o_bias")]
    if config.mlp_bias:
        rows += [Row(_LAYER + f"mlp.{name}_proj.bias", f"layers/mlp/{name}_bias") for name in ("gate", "up", "down")]
    if not config.tie_embeddings:
        rows += [Row("lm_head.weight", "head/weight")]
    copies = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_embeddings else {}
    return Table(rows, (r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq",), copies, prefix="model.")


def section(s: Settings) -> dict[str, Any]:
    heads, width = s.number("num_attention_heads"), s.number("hidden_size")
    bias = s.get("attention_bias", False)
    return {
        "vocab_size": s.number("vocab_size"),
        "max_length": s.number("max_position_embeddings"),
        "layers": s.number("num_hidden_layers"),
        "embed": width,
        "heads": heads,
        "kv_heads": s.number("num_key_value_heads", heads),
        "head": s.number("head_dim", width // heads),
        "mlp": s.number("intermediate_size"),
        "norm_epsilon": s.get("rms_norm_eps", 1e-6),
        "activation": s.activation("hidden_act", "silu"),
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": s.get("mlp_bias", False),
        "tie_embeddings": s.get("tie_word_embeddings", False),
        "init_deviation": s.get("initializer_range", 0.02),
        "rope": s.rope(),
    }


def settings(config: ModelConfig) -> dict[str, Any]:
    c = config
    only(
        "llama",
        norm=(c.norm, "rms"),
        position=(c.position, "rope"),
        gated=(c.gated, True),
        windows=(set(c.windows), {0}),
        rope_theta=(len(c.rope.theta), 1),
        qk_norm=(c.qk_norm, False),
        attention_softcap=(c.attention_softcap, 0),
        final_softcap=(c.final_softcap, 0),
        out_bias=(c.out_bias, c.qkv_bias),
    )
    return {
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.max_length,
        "num_hidden_layers": c.layers,
        "hidden_size": c.embed,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head,
        "intermediate_size": c.mlp,
        "rms_norm_eps": c.norm_epsilon,
        "hidden_act": activation_name(c.activation),
        "attention_bias": c.qkv_bias,
        "attention_dropout": 0.0,
        "mlp_bias": c.mlp_bias,
        "tie_word_embeddings": c.tie_embeddings,
        "initializer_range": c.init_deviation,
        "pretraining_tp": 1,
        **rope_settings(c.rope.theta[0], c.rope.scaling),
    }
