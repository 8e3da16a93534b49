"""Our parameters as a Hugging Face model of the same sizes, and its gradients as ours. Llama and GPT-2, for tests."""

from typing import Any

import numpy as np
import torch
import transformers

from t5x_like.models.config import ModelConfig


def llama_config(config: ModelConfig) -> transformers.LlamaConfig:
    c, d, scaling = config, config.decoder, config.decoder.rope.scaling
    rope: dict[str, Any] = {"rope_theta": d.rope.theta[0], "rope_type": "default"}
    if scaling.name == "llama3":
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency,
            "high_freq_factor": scaling.high_frequency,
            "original_max_position_embeddings": scaling.original_length,
        }
    return transformers.LlamaConfig(
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
        rope_parameters=rope,
        attn_implementation="eager",
    )


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


def build(config: ModelConfig, params: dict[str, Any]) -> torch.nn.Module:
    """The transformers model with our weights, in float32 and without dropout."""
    if config.family == "llama":
        model, state = transformers.LlamaForCausalLM(llama_config(config)), llama_state(config, params)
    else:
        model, state = transformers.GPT2LMHeadModel(gpt2_config(config)), gpt2_state(config, params)
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model.float().eval()


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


def state(config: ModelConfig, params: dict[str, Any]) -> dict[str, np.ndarray]:
    return {"llama": llama_state, "gpt2": gpt2_state}[config.family](config, params)


def loss_and_gradients(
    model: torch.nn.Module, inputs: np.ndarray, targets: np.ndarray
) -> tuple[float, np.ndarray, dict[str, np.ndarray]]:
    """(mean negative log-likelihood, logits, gradient of every parameter)."""
    logits = model(torch.from_numpy(np.array(inputs)).long(), use_cache=False).logits
    flat = torch.from_numpy(np.array(targets)).long().flatten()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), flat)
    loss.backward()
    gradients = {name: value.grad.numpy() for name, value in model.named_parameters()}
    return float(loss.detach()), logits.detach().numpy(), gradients
