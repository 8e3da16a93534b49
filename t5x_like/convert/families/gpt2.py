"""GPT-2: `config.json` and tensors of transformers' GPT2LMHeadModel, and ours.

Its matrices are Conv1D weights, stored [in, out]; queries, keys and values are one of them.
"""

from typing import Any

from t5x_like.convert.mapping import Row, Table
from t5x_like.convert.settings import Settings, activation_name, require_usual
from t5x_like.core.errors import UserError
from t5x_like.models.config import ModelConfig

_LAYER = "transformer.h.{layer}."
_QKV = tuple(f"layers/attention/{name}" for name in "qkv")


def table(config: ModelConfig) -> Table:
    norms = {"ln_1": "layers/attention_norm", "ln_2": "layers/mlp_norm"}
    rows = [
        Row("transformer.wte.weight", "embed/tokens"),
        Row("transformer.wpe.weight", "embed/positions"),
        *[
            Row(_LAYER + f"{theirs}.{end}", f"{ours}/{name}")
            for theirs, ours in norms.items()
            for end, name in (("weight", "scale"), ("bias", "bias"))
        ],
        Row(_LAYER + "attn.c_attn.weight", _QKV, "D (part N H) -> part D N H"),
        Row(_LAYER + "attn.c_attn.bias", tuple(f"{path}_bias" for path in _QKV), "(part N H) -> part N H"),
        Row(_LAYER + "attn.c_proj.weight", "layers/attention/o", "(N H) D -> N H D"),
        Row(_LAYER + "attn.c_proj.bias", "layers/attention/o_bias"),
        Row(_LAYER + "mlp.c_fc.weight", "layers/mlp/up"),
        Row(_LAYER + "mlp.c_fc.bias", "layers/mlp/up_bias"),
        Row(_LAYER + "mlp.c_proj.weight", "layers/mlp/down"),
        Row(_LAYER + "mlp.c_proj.bias", "layers/mlp/down_bias"),
        Row("transformer.ln_f.weight", "final_norm/scale"),
        Row("transformer.ln_f.bias", "final_norm/bias"),
    ]
    if not config.head.tied:
        rows += [Row("lm_head.weight", "head/weight")]
    rows += [
        Row("score.weight", f"heads/{name}/weight", "one D -> (one D)", {"one": 1}) for name in config.scalar_heads
    ]
    copies = {"lm_head.weight": "transformer.wte.weight"} if config.head.tied else {}
    # Buffers of old files: the triangle of the causal mask, and the number that stands for minus infinity.
    ignored = (r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",)
    return Table(rows, ignored, copies, prefix="transformer.")


def section(s: Settings) -> dict[str, Any]:
    s.require(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    heads, width = s.number("n_head", 12), s.number("n_embd", 768)
    scores = "score.weight" in s.tensors
    return ({"scalar_heads": ("reward",)} if scores else {}) | {
        "vocab_size": s.number("vocab_size", 50_257),
        "max_length": s.number("n_positions", 1024),
        "width": width,
        "decoder": {
            "layers": s.number("n_layer", 12),
            "heads": heads,
            "kv_heads": heads,
            "head_size": width // heads,
            "mlp": s.number("n_inner", 4 * width),
            "norm_epsilon": s.get("layer_norm_epsilon", 1e-5),
            "activation": s.activation("activation_function", "gelu_new"),
        },
        "head": {"tied": s.get("tie_word_embeddings", True) or (scores and "lm_head.weight" not in s.tensors)},
        "init": {"std": s.get("initializer_range", 0.02)},
    }


def settings(config: ModelConfig) -> dict[str, Any]:
    d = config.decoder
    assert d is not None
    require_usual(
        config, free=("head.tied", "init", "scalar_heads", "decoder.norm_epsilon", "decoder.activation", "decoder.rope")
    )
    if d.kv_heads != d.heads or d.heads * d.head_size != config.width:
        raise UserError(
            f"config.model.decoder: {d.heads} heads of {d.head_size} and {d.kv_heads} kv_heads have no place in a "
            f"Hugging Face gpt2 of width {config.width}; expected as many kv_heads, and heads * head_size = width"
        )
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_length,
        "n_ctx": config.max_length,  # what llama.cpp reads
        "n_layer": d.layers,
        "n_embd": config.width,
        "n_head": d.heads,
        "n_inner": d.mlp,
        "layer_norm_epsilon": d.norm_epsilon,
        "activation_function": activation_name(d.activation),
        "tie_word_embeddings": config.head.tied,
        "initializer_range": config.init.std,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": 0.0,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }
