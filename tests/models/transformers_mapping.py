"""Our parameters as a Hugging Face model of the same sizes, and its gradients as ours. For tests."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import transformers

from t5x_like.layers.positions import Linear, Llama3, Yarn
from t5x_like.models.config import ModelConfig, StackConfig


def rope_parameters(stack: StackConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": stack.rope.theta[0], "rope_type": stack.rope.scaling.name}
    match stack.rope.scaling.chosen:
        case None:
            return rope | {"rope_type": "default"}
        case Linear(factor):
            return rope | {"factor": factor}
        case Llama3(factor, low, high, length):
            numbers = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
            return rope | numbers | {"original_max_position_embeddings": length}
        case Yarn(factor, length, fast, slow, _):
            numbers = {"factor": factor, "beta_fast": fast, "beta_slow": slow}
            return rope | numbers | {"original_max_position_embeddings": length}


def llama_config(
    config: ModelConfig, kind: type[transformers.PreTrainedConfig] = transformers.LlamaConfig
) -> transformers.PreTrainedConfig:
    c, d = config, config.decoder
    return kind(
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        intermediate_size=d.mlp,
        num_hidden_layers=d.layers,
        num_attention_heads=d.heads,
        num_key_value_heads=d.kv_heads,
        head_dim=d.head_size,
        hidden_act=d.activation,
        max_position_embeddings=c.max_length,
        rms_norm_eps=d.norm_epsilon,
        tie_word_embeddings=c.head.tied,
        rope_parameters=rope_parameters(d),
        attn_implementation="eager",
    )


def qwen2_config(config: ModelConfig) -> transformers.PreTrainedConfig:
    return llama_config(config, transformers.Qwen2Config)


def gpt2_config(config: ModelConfig) -> transformers.GPT2Config:
    c, d = config, config.decoder
    return transformers.GPT2Config(
        vocab_size=c.vocab_size,
        n_positions=c.max_length,
        n_embd=c.width,
        n_layer=d.layers,
        n_head=d.heads,
        n_inner=d.mlp,
        activation_function="gelu_new",
        layer_norm_epsilon=d.norm_epsilon,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )


def t5_config(config: ModelConfig) -> transformers.T5Config:
    c, d = config, config.decoder
    return transformers.T5Config(
        vocab_size=c.vocab_size,
        d_model=c.width,
        d_kv=d.head_size,
        d_ff=d.mlp,
        num_layers=c.encoder.layers,
        num_decoder_layers=d.layers,
        num_heads=d.heads,
        relative_attention_num_buckets=d.relative.buckets,
        relative_attention_max_distance=d.relative.max_distance,
        dropout_rate=0.0,
        layer_norm_epsilon=d.norm_epsilon,
        feed_forward_proj="gated-gelu" if d.gated else "relu",
        tie_word_embeddings=c.head.tied,
        attn_implementation="eager",
    )


def build(config: ModelConfig, params: dict[str, Any]) -> torch.nn.Module:
    """The transformers model with our weights, in float32 and without dropout."""
    family = FAMILIES[config.family]
    model = family.model(family.config(config))
    if not config.head.tied and config.family == "t5":
        # transformers 5 always ties a fresh T5, though it loads untied ones as they are
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in state(config, params).items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = {"lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    assert not unexpected and set(missing) <= tied, (missing, unexpected)
    if config.head.tied:
        model.tie_weights()
    return model.float().eval()


def state(config: ModelConfig, params: dict[str, Any]) -> dict[str, np.ndarray]:
    return FAMILIES[config.family].state(config, params)


def llama_state(config: ModelConfig, params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Ours to theirs; linear in the values, so it serves weights and gradients alike."""
    c, d, layers = config, config.decoder, params["layers"]
    state = {
        "model.embed_tokens.weight": params["embed"]["tokens"][: c.vocab_size],
        "model.norm.weight": params["final_norm"]["scale"],
    }
    if not c.head.tied:
        state["lm_head.weight"] = params["head"]["weight"][: c.vocab_size]
    for i in range(d.layers):
        attention, mlp = layers["attention"], layers["mlp"]
        if d.qkv_bias:
            biases = {name: attention[f"{name}_bias"][i].reshape(-1) for name in "qkv"}
            state |= {f"model.layers.{i}.self_attn.{name}_proj.bias": value for name, value in biases.items()}
        state |= {
            f"model.layers.{i}.{name}.weight": np.asarray(value)
            for name, value in {
                "input_layernorm": layers["attention_norm"]["scale"][i],
                "post_attention_layernorm": layers["mlp_norm"]["scale"][i],
                "self_attn.q_proj": attention["q"][i].reshape(c.width, -1).T,
                "self_attn.k_proj": attention["k"][i].reshape(c.width, -1).T,
                "self_attn.v_proj": attention["v"][i].reshape(c.width, -1).T,
                "self_attn.o_proj": attention["o"][i].reshape(-1, c.width).T,
                "mlp.gate_proj": mlp["gate"][i].T,
                "mlp.up_proj": mlp["up"][i].T,
                "mlp.down_proj": mlp["down"][i].T,
            }.items()
        }
    return {name: np.asarray(value) for name, value in state.items()}


def gpt2_state(config: ModelConfig, params: dict[str, Any]) -> dict[str, np.ndarray]:
    c, d, layers = config, config.decoder, params["layers"]
    state = {
        "transformer.wte.weight": params["embed"]["tokens"][: c.vocab_size],
        "transformer.wpe.weight": params["embed"]["positions"],
        "transformer.ln_f.weight": params["final_norm"]["scale"],
        "transformer.ln_f.bias": params["final_norm"]["bias"],
    }
    for i in range(d.layers):
        attention, mlp = layers["attention"], layers["mlp"]
        fused = [np.asarray(attention[name][i]).reshape(c.width, -1) for name in "qkv"]
        fused_bias = [np.asarray(attention[f"{name}_bias"][i]).reshape(-1) for name in "qkv"]
        state |= {
            f"transformer.h.{i}.{name}": value
            for name, value in {
                "ln_1.weight": layers["attention_norm"]["scale"][i],
                "ln_1.bias": layers["attention_norm"]["bias"][i],
                "ln_2.weight": layers["mlp_norm"]["scale"][i],
                "ln_2.bias": layers["mlp_norm"]["bias"][i],
                "attn.c_attn.weight": np.concatenate(fused, axis=1),
                "attn.c_attn.bias": np.concatenate(fused_bias),
                "attn.c_proj.weight": attention["o"][i].reshape(-1, c.width),
                "attn.c_proj.bias": attention["o_bias"][i],
                "mlp.c_fc.weight": mlp["up"][i],
                "mlp.c_fc.bias": mlp["up_bias"][i],
                "mlp.c_proj.weight": mlp["down"][i],
                "mlp.c_proj.bias": mlp["down_bias"][i],
            }.items()
        }
    return {name: np.asarray(value) for name, value in state.items()}


def t5_state(config: ModelConfig, params: dict[str, Any]) -> dict[str, np.ndarray]:
    c = config
    state = {"shared.weight": params["embed"]["tokens"][: c.vocab_size]}
    if not c.head.tied:
        state["lm_head.weight"] = params["head"]["weight"][: c.vocab_size]
    for name, stack in c.stacks.items():
        part, first = params[name], f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        state |= {f"{name}.final_layer_norm.weight": part["final_norm"]["scale"], first: part["relative_bias"]["table"]}
        branches = [("attention", "SelfAttention")] + [("cross", "EncDecAttention")] * (name == "decoder")
        for i in range(stack.layers):
            layers, block = part["layers"], f"{name}.block.{i}.layer"
            for number, (ours, theirs) in enumerate(branches):
                state[f"{block}.{number}.layer_norm.weight"] = layers[f"{ours}_norm"]["scale"][i]
                for matrix in "qkv":
                    state[f"{block}.{number}.{theirs}.{matrix}.weight"] = layers[ours][matrix][i].reshape(c.width, -1).T
                state[f"{block}.{number}.{theirs}.o.weight"] = layers[ours]["o"][i].reshape(-1, c.width).T
            last = f"{block}.{len(branches)}"
            state[f"{last}.layer_norm.weight"] = layers["mlp_norm"]["scale"][i]
            names = {"wi_0": "gate", "wi_1": "up", "wo": "down"} if stack.gated else {"wi": "up", "wo": "down"}
            for theirs, ours in names.items():
                state[f"{last}.DenseReluDense.{theirs}.weight"] = layers["mlp"][ours][i].T
    return {name: np.asarray(value) for name, value in state.items()}


def loss_and_gradients(
    model: torch.nn.Module, batch: Mapping[str, Any], targets: np.ndarray
) -> tuple[float, np.ndarray, dict[str, np.ndarray]]:
    """(mean negative log-likelihood, logits, gradient of every parameter). batch: token ids by our names."""
    ids = {name: torch.from_numpy(np.array(value)).long() for name, value in batch.items()}
    if "encoder_inputs" in ids:
        ids = {"input_ids": ids["encoder_inputs"], "decoder_input_ids": ids["inputs"]}
    else:
        ids = {"input_ids": ids["inputs"]}
    logits = model(**ids, use_cache=False).logits
    flat = torch.from_numpy(np.array(targets)).long().flatten()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), flat)
    loss.backward()
    gradients = {name: value.grad.numpy() for name, value in model.named_parameters()}
    return float(loss.detach()), logits.detach().numpy(), gradients


@dataclasses.dataclass(frozen=True)
class Family:
    """The class of transformers, its config, and our parameters by its names."""

    model: Callable[[Any], torch.nn.Module]
    config: Callable[[ModelConfig], Any]
    state: Callable[[ModelConfig, dict[str, Any]], dict[str, np.ndarray]]


FAMILIES: dict[str, Family] = {
    "gpt2": Family(transformers.GPT2LMHeadModel, gpt2_config, gpt2_state),
    "llama": Family(transformers.LlamaForCausalLM, llama_config, llama_state),
    "qwen2": Family(transformers.Qwen2ForCausalLM, qwen2_config, llama_state),
    "t5": Family(transformers.T5ForConditionalGeneration, t5_config, t5_state),
}
