"""Models of transformers that are no family here: a config composed of our fields, and our parameters by their names.

Each is one entry of OTHERS. The mapping of names is linear in the values, so it serves weights and gradients alike.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import transformers

from t5x_like.models.config import ModelConfig
from tests.models import transformers_mapping

State = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Other:
    """fields: of `cases.section`. build: an empty model of transformers. state: ours by their names."""

    fields: Mapping[str, Any]
    build: Callable[[ModelConfig], torch.nn.Module]
    state: Callable[[ModelConfig, State], State]


def load(other: Other, config: ModelConfig, params: State) -> torch.nn.Module:
    """The model of transformers with our weights, in float32 and without dropout."""
    model = other.build(config)
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in other.state(config, params).items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = {"lm_head.weight", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    assert not unexpected and set(missing) <= tied, (missing, unexpected)
    model.tie_weights()
    return model.float().eval()


def _flat(weight: Any) -> np.ndarray:
    """[D, N, H] as the weight of a torch Linear, [N H, D]."""
    return np.asarray(weight).reshape(weight.shape[0], -1).T


def _fused(attention: State, i: int, end: str = "") -> np.ndarray:
    """Queries, keys and values of each head behind one another (GPT-NeoX, BLOOM): [N 3 H, ...]."""
    parts = np.stack([np.asarray(attention[f"{name}{end}"][i]) for name in "qkv"], axis=-2)
    return parts.reshape(-1) if end else parts.reshape(parts.shape[0], -1).T


def _norm(name: str, params: State, i: int | None = None) -> dict[str, Any]:
    """A layer norm."""
    return {
        f"{name}.{theirs}": params[ours] if i is None else params[ours][i]
        for theirs, ours in (("weight", "scale"), ("bias", "bias"))
    }


def _output(weight: Any) -> np.ndarray:
    """[N, H, D] as the weight of a torch Linear, [D, N H]."""
    return np.asarray(weight).reshape(-1, weight.shape[-1]).T


def _bert(c: ModelConfig) -> torch.nn.Module:
    e = c.stack("encoder")
    config = transformers.BertConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        num_hidden_layers=e.layers,
        num_attention_heads=e.heads,
        intermediate_size=e.mlp,
        hidden_act="gelu",
        max_position_embeddings=c.max_length,
        type_vocab_size=c.embedding.types,
        layer_norm_eps=e.norm_epsilon,
        attn_implementation="eager",
    )
    return transformers.BertForMaskedLM(config)


def _bert_state(c: ModelConfig, p: State) -> State:
    embed, head, layers = p["embed"], p["head"], p["layers"]
    state = {
        "bert.embeddings.word_embeddings.weight": embed["tokens"][: c.vocab_size],
        "bert.embeddings.position_embeddings.weight": embed["positions"],
        "bert.embeddings.token_type_embeddings.weight": embed["types"],
        **_norm("bert.embeddings.LayerNorm", embed["norm"]),
        "cls.predictions.transform.dense.weight": head["transform"]["dense"].T,
        "cls.predictions.transform.dense.bias": head["transform"]["dense_bias"],
        **_norm("cls.predictions.transform.LayerNorm", head["transform"]["norm"]),
        "cls.predictions.bias": head["bias"][: c.vocab_size],
    }
    for i in range(c.stack("encoder").layers):
        attention, mlp, at = layers["attention"], layers["mlp"], f"bert.encoder.layer.{i}."
        for name, ours in (("query", "q"), ("key", "k"), ("value", "v")):
            state[f"{at}attention.self.{name}.weight"] = _flat(attention[ours][i])
            state[f"{at}attention.self.{name}.bias"] = attention[f"{ours}_bias"][i].reshape(-1)
        state |= {
            f"{at}attention.output.dense.weight": _output(attention["o"][i]),
            f"{at}attention.output.dense.bias": attention["o_bias"][i],
            **_norm(f"{at}attention.output.LayerNorm", layers["attention_norm"], i),
            f"{at}intermediate.dense.weight": mlp["up"][i].T,
            f"{at}intermediate.dense.bias": mlp["up_bias"][i],
            f"{at}output.dense.weight": mlp["down"][i].T,
            f"{at}output.dense.bias": mlp["down_bias"][i],
            **_norm(f"{at}output.LayerNorm", layers["mlp_norm"], i),
        }
    return state


def _like_llama(c: ModelConfig) -> dict[str, Any]:
    d = c.decoder
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "intermediate_size": d.mlp,
        "num_hidden_layers": d.layers,
        "num_attention_heads": d.heads,
        "num_key_value_heads": d.kv_heads,
        "head_dim": d.head_size,
        "max_position_embeddings": c.max_length,
        "rms_norm_eps": d.norm_epsilon,
        "tie_word_embeddings": c.head.tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": max(d.rope.theta)},
        "pad_token_id": 0,
        "attn_implementation": "eager",
    }


def _renamed(state: State, names: Mapping[str, str]) -> dict[str, Any]:
    """The state of a Llama with other names of its norms."""
    found = {}
    for name, value in state.items():
        last = name.removesuffix(".weight").split(".")[-1]
        found[name.replace(last, names.get(last, last))] = value
    return found


def _gemma2(c: ModelConfig) -> torch.nn.Module:
    d = c.decoder
    config = transformers.Gemma2Config(
        **_like_llama(c),
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=round(d.attention_scale**-2),
        attn_logit_softcapping=d.attention_softcap,
        final_logit_softcapping=c.head.softcap,
        sliding_window=max(d.windows),
        layer_types=["sliding_attention" if kind.window else "full_attention" for kind in d.kinds],
    )
    return transformers.Gemma2ForCausalLM(config)


def _gemma2_state(c: ModelConfig, p: State) -> State:
    names = {"post_attention_layernorm": "pre_feedforward_layernorm"}
    state = _renamed(transformers_mapping.llama_state(c, dict(p)), names)
    for i in range(c.decoder.layers):
        at = f"model.layers.{i}."
        state[f"{at}post_attention_layernorm.weight"] = p["layers"]["attention_after_norm"]["scale"][i]
        state[f"{at}post_feedforward_layernorm.weight"] = p["layers"]["mlp_after_norm"]["scale"][i]
    return state


def _olmo2_state(c: ModelConfig, p: State) -> State:
    names = {"input_layernorm": "post_attention_layernorm", "post_attention_layernorm": "post_feedforward_layernorm"}
    state = _renamed(transformers_mapping.llama_state(c, dict(p)), names)
    for i in range(c.decoder.layers):
        for name in "qk":
            norm = p["layers"]["attention"][f"{name}_norm"]["scale"][i]
            state[f"model.layers.{i}.self_attn.{name}_norm.weight"] = norm
    return state


def _gpt_neox(c: ModelConfig) -> torch.nn.Module:
    d = c.decoder
    config = transformers.GPTNeoXConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        num_hidden_layers=d.layers,
        num_attention_heads=d.heads,
        intermediate_size=d.mlp,
        hidden_act="gelu",
        max_position_embeddings=c.max_length,
        layer_norm_eps=d.norm_epsilon,
        use_parallel_residual=True,
        rope_parameters={"rope_type": "default", "rope_theta": d.rope.theta[0], "partial_rotary_factor": 1.0},
        attn_implementation="eager",
    )
    return transformers.GPTNeoXForCausalLM(config)


def _fused_layer(p: State, i: int, at: str, attention_name: str) -> dict[str, Any]:
    """A layer of GPT-NeoX or BLOOM."""
    layers, attention, mlp = p["layers"], p["layers"]["attention"], p["layers"]["mlp"]
    return {
        **_norm(f"{at}input_layernorm", layers["attention_norm"], i),
        **_norm(f"{at}post_attention_layernorm", layers["mlp_norm"], i),
        f"{at}{attention_name}.query_key_value.weight": _fused(attention, i),
        f"{at}{attention_name}.query_key_value.bias": _fused(attention, i, "_bias"),
        f"{at}{attention_name}.dense.weight": _output(attention["o"][i]),
        f"{at}{attention_name}.dense.bias": attention["o_bias"][i],
        f"{at}mlp.dense_h_to_4h.weight": mlp["up"][i].T,
        f"{at}mlp.dense_h_to_4h.bias": mlp["up_bias"][i],
        f"{at}mlp.dense_4h_to_h.weight": mlp["down"][i].T,
        f"{at}mlp.dense_4h_to_h.bias": mlp["down_bias"][i],
    }


def _gpt_neox_state(c: ModelConfig, p: State) -> State:
    state = {
        "gpt_neox.embed_in.weight": p["embed"]["tokens"][: c.vocab_size],
        **_norm("gpt_neox.final_layer_norm", p["final_norm"]),
        "lm_head.weight": p["head"]["weight"][: c.vocab_size],
    }
    for i in range(c.decoder.layers):
        state |= _fused_layer(p, i, f"gpt_neox.layers.{i}.", "attention")
    return state


def _bloom(c: ModelConfig) -> torch.nn.Module:
    d = c.decoder
    config = transformers.BloomConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        n_layer=d.layers,
        n_head=d.heads,
        layer_norm_epsilon=d.norm_epsilon,
    )
    return transformers.BloomForCausalLM(config)


def _bloom_state(c: ModelConfig, p: State) -> State:
    state = {
        "transformer.word_embeddings.weight": p["embed"]["tokens"][: c.vocab_size],
        **_norm("transformer.word_embeddings_layernorm", p["embed"]["norm"]),
        **_norm("transformer.ln_f", p["final_norm"]),
    }
    for i in range(c.decoder.layers):
        state |= _fused_layer(p, i, f"transformer.h.{i}.", "self_attention")
    return state


def _smollm3(c: ModelConfig) -> torch.nn.Module:
    rotary = [int(kind.rope_theta > 0) for kind in c.decoder.kinds]
    return transformers.SmolLM3ForCausalLM(transformers.SmolLM3Config(**_like_llama(c), no_rope_layers=rotary))


def _llama_state(c: ModelConfig, p: State) -> State:
    return transformers_mapping.llama_state(c, dict(p))


def _cohere(c: ModelConfig) -> torch.nn.Module:
    d, fields = c.decoder, _like_llama(c)
    config = transformers.CohereConfig(
        **{name: value for name, value in fields.items() if name != "rms_norm_eps"},
        layer_norm_eps=d.norm_epsilon,
        logit_scale=c.head.scale,
    )
    return transformers.CohereForCausalLM(config)


def _cohere_state(c: ModelConfig, p: State) -> State:
    """Its pairs of a head are (2i, 2i + 1), its one norm of a layer serves both branches, and norms have no bias."""
    state = dict(transformers_mapping.llama_state(c, dict(p)))
    for i in range(c.decoder.layers):
        at = f"model.layers.{i}."
        state.pop(f"{at}post_attention_layernorm.weight")
        for name in ("q_proj", "k_proj"):
            rows = state[f"{at}self_attn.{name}.weight"]
            halves = rows.reshape(-1, 2, c.decoder.head_size // 2, c.width)
            state[f"{at}self_attn.{name}.weight"] = halves.swapaxes(1, 2).reshape(rows.shape)
    return state


def _scaled_llama(scaling: Mapping[str, Any]) -> Other:
    fields = {"family": "llama", "rope": {"theta": (100.0,), "scaling": scaling}}
    return Other(
        fields,
        lambda c: transformers.LlamaForCausalLM(transformers_mapping.llama_config(c)),
        _llama_state,
    )


_NO_SCALING = {"name": "none"}
OTHERS: dict[str, Other] = {
    "bert": Other(
        {
            "family": "t5",
            "architecture": "encoder",
            "norm": "layer",
            "norm_order": "post",
            "final_norm": False,
            "position": "learned",
            "activation": "gelu",
            "attention_scale": 0.0,
            **{f"{name}_bias": True for name in ("qkv", "out", "mlp")},
            "embedding": {"scale": 1.0, "norm": True, "types": 2, "offset": 0},
            "head": {"tied": True, "scale": 1.0, "bias": True, "softcap": 0.0, "transform": True},
        },
        _bert,
        _bert_state,
    ),
    "gemma2": Other(
        {
            "family": "llama",
            "layers": 3,
            "kv_heads": 2,
            "norm": "rms_plus_one",
            "norm_order": "sandwich",
            "activation": "gelu_tanh",
            "attention_scale": 12**-0.5,
            "attention_softcap": 5.0,
            "softcap": 3.0,
            "windows": (4, 0),
            "tied": True,
            "embedding": {"scale": 0.0, "norm": False, "types": 0, "offset": 0},
        },
        _gemma2,
        _gemma2_state,
    ),
    "gpt_neox": Other(
        {
            "family": "gpt2",
            "position": "rope",
            "rope": {"theta": (100.0,), "scaling": _NO_SCALING},
            "parallel": True,
            "activation": "gelu",
        },
        _gpt_neox,
        _gpt_neox_state,
    ),
    "bloom": Other(
        {
            "family": "gpt2",
            "position": "alibi",
            "mlp": 128,
            "tied": True,
            "embedding": {"scale": 1.0, "norm": True, "types": 0, "offset": 0},
        },
        _bloom,
        _bloom_state,
    ),
    # Its norm of queries and keys spans all heads, which is ours where there is one.
    "olmo2": Other(
        {"family": "llama", "heads": 1, "kv_heads": 1, "head_size": 32, "norm_order": "branch", "qk_norm": True},
        lambda c: transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**_like_llama(c))),
        _olmo2_state,
    ),
    "smollm3_without_rope": Other(
        {"family": "llama", "layers": 3, "windows": (0, 0), "rope": {"theta": (100.0, 0.0), "scaling": _NO_SCALING}},
        _smollm3,
        _llama_state,
    ),
}


COHERE = Other(
    {"family": "llama", "kv_heads": 2, "norm": "layer", "parallel": True, "tied": True, "scale": 0.0625},
    _cohere,
    _cohere_state,
)


def scaled_ropes(scalings: Mapping[str, Mapping[str, Any]]) -> dict[str, Other]:
    return {f"llama_{name}_rope": _scaled_llama(scaling) for name, scaling in scalings.items()}
