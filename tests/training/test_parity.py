"""The compiled train step on 8 devices against one device: same loss, same gradients, expected collectives.

Gradients are read from the momentum of SGD, which after one step is the gradient itself. CASES are those of every
change; all runs on all meshes are compared by `make nightly`.
"""

import dataclasses
import functools
import re
import zlib
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.pretrain import test as test_config
from t5x_like.convert.stored import StoredModel
from t5x_like.core import tree
from t5x_like.core.types import Tree
from t5x_like.models.config import ModelConfig
from t5x_like.parallel import mesh as meshes
from t5x_like.peft.attach import is_adapter
from t5x_like.runs import program as programs
from t5x_like.runs import train as experiments
from tests.training import conversations

MESHES = {
    "data=8": {"preset": "data"},
    "fsdp=8": {"preset": "fsdp"},
    "data=2 fsdp=2 tensor=2": {"preset": "fsdp_tensor", "data": 2, "fsdp": 2, "tensor": 2},
    "fsdp=2 sequence=2 tensor=2": {"preset": "fsdp_tensor_sequence"},
    "fsdp=2 sequence=4": {"preset": "fsdp", "sequence": 4, "rules": "embed=fsdp+sequence"},
    "slice=2 fsdp=2 tensor=2": {"preset": "fsdp_tensor", "slice": 2, "fsdp": 2, "tensor": 2},
    "tensor=8, kv heads replicated": {"preset": "fsdp_tensor", "fsdp": 1, "tensor": 8},
}
FAMILIES = {
    "llama": {"kv_heads": 2, "windows": (8, 0)},
    "gpt2": {"kv_heads": 8},
    "t5": {"kv_heads": 8},
}
# Runs that train otherwise than by the objective and parameters of a config: by name, the family and what changes.
_LORA = {"adapter": {"name": "lora"}, "checkpoint": {"init_from": "not read here"}}
_PAIRS = {"features": "pairs", "packing": "single"}
_PAIR_TEXTS = {"features": "pair_texts", "packing": "single"}
_GRPO = {"kl_coefficient": 0.1, "reference": "base", "aggregation": "token", "temperature": 0.7}
_ROLLOUTS = {"features": "rollouts", "packing": "single"}
_CHATS = {"packing": "examples", "length": 96, "fields": {"inputs": "", "targets": "", "messages": "messages"}}
_ROLE = {"reference": {"source": "not read here", "rules": "", "dtype": "stored"}}
_REWARD = {
    "objective": {"name": "reward", "reward": {"centering": 0.1}},
    "data": _PAIR_TEXTS,
    "model": {"scalar_heads": ("reward",), "head": {"tied": True}},  # the LM head itself learns nothing
}


def _dpo(reference: str, **fields) -> dict:
    return {"objective": {"name": "dpo", "dpo": {"beta": 0.3, "reference": reference, **fields}}, "data": _PAIRS}


RUNS = {
    "lora": ("llama", _LORA),
    "reward": ("llama", _REWARD),
    "reward of t5": ("t5", _REWARD),
    "dpo": ("llama", _dpo("none", label_smoothing=0.1)),
    "dpo of t5": ("t5", _dpo("none", length_normalized=True)),
    "dpo beside a model": ("llama", _dpo("role") | {"roles": _ROLE}),
    "dpo of t5 beside a model": ("t5", _dpo("role", label_smoothing=0.1) | {"roles": _ROLE}),
    # Means, since an adapter moves sums of some -150 by little: their difference is known to 1e-5 in float32.
    "dpo beside its base": ("llama", _dpo("base", length_normalized=True) | _LORA),
    "dpo of t5 beside its base": ("t5", _dpo("base", length_normalized=True) | _LORA),
    "dpo of a cached reference": ("llama", _dpo("cache", length_normalized=True) | {"roles": _ROLE}),
    "grpo": ("llama", {"objective": {"name": "grpo", "grpo": _GRPO | {"aggregation": "sequence"}}, "data": _ROLLOUTS}),
    "grpo of t5": ("t5", {"objective": {"name": "grpo", "grpo": _GRPO}, "data": _ROLLOUTS}),
    "sft": ("llama", {"data": _CHATS | {"chat": {"template": "plain"}}}),
    "sft of t5": ("t5", {"data": _CHATS | {"chat": {"template": "t5"}, "encoder_length": 96}}),
}


def _config(name: str) -> ConfigDict:
    family, changes = RUNS.get(name, (name, {}))
    config = test_config.get_config()
    config.model.family = family
    stack = {"layers": 2, "heads": 8, "head_size": 8, "mlp": 64, **FAMILIES[family]}
    config.model.decoder.update(stack)
    config.model.head.tied = family != "llama"
    if family == "t5":
        config.model.encoder.update(stack)
        config.data.update({"features": "source_target", "encoder_length": 16, "packing": "examples"})
        config.data.fields.update({"inputs": "inputs", "targets": "targets"})
    config.optim.update({"name": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "clip_norm": 0.0})
    config.optim.schedule.update({"name": "constant", "warmup_steps": 0})
    config.optim.sgd.momentum = 0.9
    config.objective.lm.z_loss = 1e-2
    config.objective.lm.label_smoothing = 0.1 if family == "gpt2" else 0.0
    config.runtime.compiler_options.cpu = {"xla_backend_optimization_level": 0}  # compiles sooner, computes the same
    for section, fields in changes.items():
        config[section].update(fields)
    return config


def _varied(params: Tree) -> Tree:
    """Where an adapter begins with zeros, half of its gradients are zero: it goes on from elsewhere."""
    draw = np.random.default_rng(1)

    def away(path: str, leaf: jax.Array) -> jax.Array:
        noise = draw.standard_normal(leaf.shape).astype(np.float32)
        return jax.device_put(0.1 * noise, leaf.sharding) if is_adapter(path) else leaf

    return tree.map_with_path(away, params)


@functools.cache
def _batch(name: str) -> dict[str, np.ndarray]:
    """Packed conversations, of which only the assistant's words have loss; of other runs, `_documents`. The answers of
    a pair share one source, of a length of its own."""
    if name.startswith("sft"):
        return conversations.rows(_config(name).data.to_dict())
    batch = _documents()
    if name.startswith(("reward of t5", "dpo of t5")):
        columns = np.tile(np.arange(16, dtype=np.int32), (8, 1))
        inside = columns < np.arange(9, 17)[:, None]
        batch |= {"encoder_segment_ids": inside.astype(np.int32), "encoder_positions": columns * inside}
    return batch


def _documents() -> dict[str, np.ndarray]:
    """Two documents a row, and padding at the end of every other row."""
    rng = np.random.default_rng(0)
    rows, length = 8, 32
    tokens = rng.integers(0, 256, (rows, length + 1)).astype(np.int32)
    segments = np.ones((rows, length), np.int32)
    segments[:, 12:] = 2
    segments[::2, 28:] = 0
    positions = np.tile(np.concatenate([np.arange(12), np.arange(20)]), (rows, 1)).astype(np.int32)
    sources = np.ones((rows, 16), np.int32)  # of the two documents, and padding in every other row
    sources[:, 9:] = 2
    sources[::2, 14:] = 0
    logp = rng.normal(-5.0, 1.0, (3, rows, length)).astype(np.float32)
    return {
        "old_logp": logp[0],
        "reference_logp": logp[1],
        "rollout_logp": logp[2],
        "advantages": rng.normal(size=rows).astype(np.float32),
        "on_policy": (np.arange(rows) % 2).astype(np.float32),
        "chosen/reference_logp": rng.normal(-60.0, 5.0, rows).astype(np.float32),
        "rejected/reference_logp": rng.normal(-60.0, 5.0, rows).astype(np.float32),
        **_side("chosen", tokens, rng),
        **_side("rejected", tokens[::-1], rng),
        "encoder_inputs": rng.integers(0, 256, (rows, 16)).astype(np.int32),
        "encoder_segment_ids": sources,
        "encoder_positions": np.tile(np.concatenate([np.arange(9), np.arange(7)]), (rows, 1)).astype(np.int32),
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": (segments > 0).astype(np.float32),
        "segment_ids": segments,
        "positions": positions,
        "target_bytes": np.ones((rows, length), np.int32),
    }


def _side(side: str, tokens: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One answer of each pair, of a length of its own."""
    rows, length = tokens[:, 1:].shape
    columns = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    inside = columns < rng.integers(12, length + 1, (rows, 1))
    return {
        f"{side}/inputs": np.where(inside, tokens[:, :-1], 0),
        f"{side}/targets": np.where(inside, tokens[:, 1:], 0),
        f"{side}/loss_weights": (inside & (columns >= 5)).astype(np.float32),
        f"{side}/segment_ids": inside.astype(np.int32),
        f"{side}/positions": np.where(inside, columns, 0),
    }


@dataclasses.dataclass(frozen=True)
class Result:
    loss: float
    gradients: dict[str, np.ndarray]
    program: programs.Program
    text: str


def _reference(config: ModelConfig) -> StoredModel:
    """A model like the policy, of other parameters: where the tables lay each, whatever the mesh."""

    def read(templates: Tree) -> dict[str, Any]:
        def leaf(path: str, template: jax.ShapeDtypeStruct) -> jax.Array:
            noise = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(template.shape)
            values = (0.1 * noise + (1.0 if "norm" in path else 0.0)).astype(template.dtype)
            return jax.device_put(values, template.sharding)

        return tree.map_with_path(leaf, templates)

    return StoredModel("reference", None, config, None, None, start_token="pad", read=read)


@functools.cache
def _step(run: str, mesh_name: str = "", micro_batches: int = 1) -> Result:
    """On a mesh of MESHES, or on one device."""
    config = _config(run)
    config.loop.micro_batches = micro_batches
    config.mesh.update(MESHES[mesh_name] if mesh_name else {"preset": "data"})
    return _stepped(run, config, jax.devices() if mesh_name else jax.devices()[:1])


def _stepped(run: str, config: ConfigDict, devices: list[jax.Device]) -> Result:
    """One step of a run, as its config says, on these devices."""
    experiment = experiments.from_config(config)
    mesh = meshes.make(experiment.mesh, devices)
    with jax.set_mesh(mesh):
        programs.check_mesh(experiment, mesh.shape)
        program = programs.step_program(experiment, mesh, opened=lambda name, source: _reference(experiment.model))
        state, frozen = programs.initialize(program, seed=0)
        state["params"] = _varied(state["params"])
        host = _batch(run)
        batch = {name: jax.device_put(host[name], leaf.sharding) for name, leaf in program.batch.items()}
        compiled = program.step.lower(state, frozen, batch).compile()
        state, metrics = compiled(state, frozen, batch)
    gradients = tree.flatten(jax.device_get(state["optimizer"]["momentum"]))
    return Result(float(metrics["loss"]), gradients, program, compiled.as_text())


DATA, FSDP, TENSOR, SEQUENCE = list(MESHES)[:4]
# One mesh for each run, of which that with parts of rows divides in every way; what several runs share is compared on
# more of them.
CASES = [("llama", name) for name in MESHES] + [
    ("gpt2", TENSOR),
    ("gpt2", SEQUENCE),
    ("t5", TENSOR),
    ("t5", SEQUENCE),
    ("lora", SEQUENCE),
    ("reward", SEQUENCE),
    ("reward of t5", SEQUENCE),
    ("dpo", TENSOR),
    ("dpo of t5", SEQUENCE),
    ("dpo beside a model", SEQUENCE),
    ("dpo of t5 beside its base", SEQUENCE),
    ("grpo", TENSOR),
    ("grpo of t5", SEQUENCE),
    ("sft", SEQUENCE),
    ("sft of t5", SEQUENCE),
]
ALL = [*FAMILIES, *RUNS]
COMPARED = {run for run, _ in CASES}


def _case(*given: str, slow: bool) -> Any:
    return pytest.param(*given, marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize(
    "run,name", [_case(run, name, slow=(run, name) not in CASES) for run in ALL for name in MESHES]
)
def test_loss_and_every_gradient_equal_those_of_one_device(run, name):
    _assert_equal(_step(run), _step(run, name))


def test_packed_conversations_have_loss_on_few_of_their_tokens():
    for name in ("sft", "sft of t5"):
        batch = _batch(name)
        assert batch["segment_ids"].max() > 1
        inside, trained = (batch["segment_ids"] > 0).sum(axis=1), batch["loss_weights"].sum(axis=1)
        assert (trained > 0).all() and len(set(trained.tolist())) > 2
        assert (trained < inside / 2).all() if name == "sft" else (trained == inside).all()


@pytest.mark.parametrize("run", [_case(run, slow=run not in COMPARED) for run in ALL])
def test_micro_batches_give_the_loss_and_gradients_of_the_whole_batch(run):
    """Though micro-batches hold different numbers of tokens, as every other row is padded more."""
    result = _step(run, micro_batches=4)
    assert " while(" in result.text
    _assert_equal(_step(run), result)


@pytest.mark.parametrize("run", [_case(run, slow=run not in ("dpo beside a model", "sft of t5")) for run in ALL])
def test_micro_batches_on_a_mesh_give_them_too(run):
    _assert_equal(_step(run), _step(run, SEQUENCE, micro_batches=2))


def test_what_a_reference_says_changes_the_gradients():
    """So that it is compared where runs with one are."""
    runs = ("dpo beside a model", "dpo of t5 beside its base")
    beside, base = (_step(run) for run in runs)
    assert abs(beside.loss - np.log(2)) > 1e-3 and abs(base.loss - np.log(2)) > 1e-3


def _assert_equal(reference: Result, result: Result) -> None:
    assert result.loss == pytest.approx(reference.loss, rel=1e-6)
    for path, gradient in reference.gradients.items():
        largest = np.abs(gradient).max()
        assert largest > 0, f"{path} has no gradient: nothing is compared"
        if path.endswith("/k_bias"):  # the same for every key, so softmax does not see it: what is left are roundings
            assert max(largest, np.abs(result.gradients[path]).max()) < 1e-9
            continue
        assert np.abs(result.gradients[path] - gradient).max() <= 1e-5 * largest, path


def _kinds(text: str) -> set[str]:
    return set(re.findall(r"\b(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text))


def test_the_compiled_steps_hold_the_collectives_that_their_presets_are_for():
    assert _kinds(_step("llama").text) == set()
    assert _kinds(_step("llama", DATA).text) == {"all-reduce"}
    fsdp = _kinds(_step("llama", FSDP).text)
    assert "all-gather" in fsdp and fsdp & {"reduce-scatter", "all-reduce"}
    # Here no axis divides the rows: what is summed are the parts of a layer's output.
    assert "all-reduce" in _kinds(_step("llama", "tensor=8, kv heads replicated").text)


@pytest.mark.parametrize("name,limit", [("fsdp=8", 512), ("data=2 fsdp=2 tensor=2", 512)])
def test_no_parameter_above_a_small_size_is_replicated(name, limit):
    """Norm scales (32 numbers a layer) are; whatever is larger than `limit` numbers lies in parts."""
    config = _config("llama")
    config.mesh.update(MESHES[name])
    experiment = experiments.from_config(config)
    mesh = meshes.make(experiment.mesh)
    with jax.set_mesh(mesh):
        layout = programs.step_program(experiment, mesh).layout
    sizes = {path: leaf for path, leaf in tree.leaves(layout.state["params"]) if leaf.size > limit}
    assert len(sizes) >= 8
    for path, leaf in sizes.items():
        assert not leaf.sharding.is_fully_replicated, path
