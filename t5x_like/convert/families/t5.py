"""T5 1.0, 1.1, FLAN-T5 and mT5: `config.json` and tensors of transformers' T5ForConditionalGeneration, and ours.

Matrices are stored [out, in] there. The table of position biases stands in the first block of each stack, for all.
What tells 1.0 from 1.1 is `feed_forward_proj` and, oddly, `tie_word_embeddings`: anything but false also means that
logits are scaled by d_model ** -0.5, and transformers 5, which keeps that in `scale_decoder_outputs`, always says true.
"""

from collections.abc import Iterator
from typing import Any

from t5x_like.convert.mapping import Row, Table
from t5x_like.convert.settings import Settings, activation_name, require_usual
from t5x_like.core.errors import UserError
from t5x_like.models.config import ModelConfig, StackConfig

_FREE = ("norm_epsilon", "activation", "gated", "relative")
_SCALED, _PLAIN = 0.0, 1.0  # our head.scale: width ** -0.5, and none


def table(config: ModelConfig) -> Table:
    """UserError for a scalar head, which no class of transformers has on this family as we have it."""
    if config.scalar_heads:
        raise UserError(
            f"config.model.scalar_heads={config.scalar_heads!r}: transformers has no T5 with a head of one number; "
            "read this model by t5x_like.load(DIR).read(prompts, answers)"
        )
    rows = [Row("shared.weight", "embed/tokens")]
    for name, stack in config.stacks.items():
        rows += _stack(name, stack)
    if not config.head.tied:
        rows += [Row("lm_head.weight", "head/weight")]
    tied = {"lm_head.weight": "shared.weight"} if config.head.tied else {}
    copies = {f"{name}.embed_tokens.weight": "shared.weight" for name in config.stacks}
    # Stands in the first published files, and is read by no version of transformers.
    ignored = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)
    # Version 4 scales the logits of every head that is tied: one without a scale is written as a head of its own.
    written = tuple(tied) if config.head.scale == _PLAIN else ()
    return Table(rows, ignored, {**copies, **tied}, written_copies=written)


def _stack(name: str, stack: StackConfig) -> Iterator[Row]:
    branches = [("SelfAttention", "attention"), *([("EncDecAttention", "cross")] if name == "decoder" else [])]
    for number, (theirs, ours) in enumerate(branches):
        block, path = f"{name}.block.{{layer}}.layer.{number}.", f"{name}/layers/{ours}"
        yield Row(f"{block}layer_norm.weight", f"{path}_norm/scale")
        for part in "qkv":
            yield Row(f"{block}{theirs}.{part}.weight", f"{path}/{part}", "(N H) D -> D N H")
        yield Row(f"{block}{theirs}.o.weight", f"{path}/o", "D (N H) -> N H D")
    block = f"{name}.block.{{layer}}.layer.{len(branches)}."
    yield Row(f"{block}layer_norm.weight", f"{name}/layers/mlp_norm/scale")
    inner = {"wi_0": "gate", "wi_1": "up"} if stack.gated else {"wi": "up"}
    for theirs, ours in inner.items():
        yield Row(f"{block}DenseReluDense.{theirs}.weight", f"{name}/layers/mlp/{ours}", "F D -> D F")
    yield Row(f"{block}DenseReluDense.wo.weight", f"{name}/layers/mlp/down", "D F -> F D")
    table = f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    yield Row(table, f"{name}/relative_bias/table")
    yield Row(f"{name}.final_layer_norm.weight", f"{name}/final_norm/scale")


def section(s: Settings) -> dict[str, Any]:
    s.require(is_encoder_decoder=True)
    scaled = s.get("scale_decoder_outputs", s.get("tie_word_embeddings", True))
    kind = s.get("feed_forward_proj", "relu")
    activation = s.activation_of("feed_forward_proj", "gelu_new" if kind == "gated-gelu" else kind.split("-")[-1])
    stack = {
        "layers": s.number("num_layers", 6),
        "heads": s.number("num_heads", 8),
        "kv_heads": s.number("num_heads", 8),
        "head_size": s.number("d_kv", 64),
        "mlp": s.number("d_ff", 2048),
        "norm_epsilon": s.get("layer_norm_epsilon", 1e-6),
        "activation": activation,
        "gated": kind.startswith("gated-"),
        "relative": {
            "buckets": s.number("relative_attention_num_buckets", 32),
            "max_distance": s.number("relative_attention_max_distance", 128),
        },
    }
    return {
        "vocab_size": s.number("vocab_size", 32_128),
        "max_length": s.number("n_positions", 512),
        "width": s.number("d_model", 512),
        "encoder": stack,
        "decoder": stack | {"layers": s.number("num_decoder_layers", stack["layers"])},
        "head": {
            "tied": scaled or "lm_head.weight" not in s.tensors,
            "scale": _SCALED if scaled else _PLAIN,
        },
        "init": {"std": s.get("initializer_factor", 1.0)},
    }


def settings(config: ModelConfig) -> dict[str, Any]:
    stacks = [f"{name}.{field}" for name in ("encoder", "decoder") for field in _FREE]
    require_usual(config, free=("head.tied", "head.scale", "init.std", *stacks))
    encoder, decoder, head = config.encoder, config.decoder, config.head
    assert encoder is not None and decoder is not None  # else require_usual had refused the architecture
    fields = ("heads", "kv_heads", "head_size", "mlp", *_FREE)
    for field in fields:
        if getattr(encoder, field) != getattr(decoder, field) or decoder.kv_heads != decoder.heads:
            raise UserError(
                f"config.model: {field} of encoder ({getattr(encoder, field)}) and decoder ({getattr(decoder, field)}) "
                "have no place in a Hugging Face t5; expected equal ones, and as many kv_heads as heads"
            )
    if head.scale not in (_SCALED, _PLAIN) or (head.scale == _SCALED and not head.tied):
        raise UserError(
            f"config.model.head: tied={head.tied} with scale={head.scale} has no place in a Hugging Face t5; expected "
            f"a tied head with scale {_SCALED}, or scale {_PLAIN}"
        )
    name = activation_name(decoder.activation)
    return {
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "n_positions": config.max_length,
        "d_model": config.width,
        "d_kv": decoder.head_size,
        "d_ff": decoder.mlp,
        "num_layers": encoder.layers,
        "num_decoder_layers": decoder.layers,
        "num_heads": decoder.heads,
        "relative_attention_num_buckets": decoder.relative.buckets,
        "relative_attention_max_distance": decoder.relative.max_distance,
        "dropout_rate": config.dropout,
        "layer_norm_epsilon": decoder.norm_epsilon,
        "initializer_factor": config.init.std,
        "feed_forward_proj": ("gated-gelu" if name == "gelu_new" else f"gated-{name}") if decoder.gated else name,
        "tie_word_embeddings": head.tied and head.scale == _SCALED,
        "scale_decoder_outputs": head.scale == _SCALED,
    }
