"""The train step with rows in parts over `sequence`, through the TPU's attention kernel, against one device.

The kernel runs interpreted on the CPU. On the meshes its shards exchange halves of their queries; all else of the step
(documents in a row, grouped heads, remat, scanned layers, micro-batches) is that of any run.
"""

import functools

import jax
import numpy as np
import pytest

from configs.pretrain import test as test_config
from t5x_like.core import tree
from t5x_like.layers.attention import choice, kernels
from t5x_like.parallel import mesh as meshes
from t5x_like.runs import program as programs
from t5x_like.runs import train as experiments

ROWS, LENGTH = 4, 512
MESHES = {
    "sequence=2 tensor=2": {"preset": "fsdp_tensor_sequence", "fsdp": 1},
    "fsdp=2 sequence=2 tensor=2": {"preset": "fsdp_tensor_sequence"},
    "sequence=2, parameters over it": {"preset": "fsdp", "fsdp": 1, "sequence": 2, "rules": "embed=fsdp+sequence"},
}


def _config(mesh, **changes):
    config = test_config.get_config()
    layers = changes.pop("layers")
    stack = {"layers": layers, "heads": 4, "kv_heads": 2, "head_size": 128, "mlp": 64, "windows": (300, 0)[-layers:]}
    config.model.decoder.update(stack)
    config.model.decoder.attention_softcap = changes.pop("softcap", 0.0)
    config.model.update({"remat": "full", "max_length": LENGTH})
    config.data.update({"batch_size": ROWS, "length": LENGTH})
    config.optim.update({"name": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "clip_norm": 0.0})
    config.optim.schedule.update({"name": "constant", "warmup_steps": 0})
    config.optim.sgd.momentum = 0.9
    config.runtime.compiler_options.cpu = {"xla_backend_optimization_level": 0}
    config.loop.update(changes)
    config.mesh.update(mesh)
    return config


def _batch():
    """Three documents a row, and padding at the end of every other row."""
    tokens = np.random.default_rng(0).integers(0, 256, (ROWS, LENGTH + 1)).astype(np.int32)
    starts = np.array([0, 70, 300])
    segments = np.tile(np.searchsorted(starts, np.arange(LENGTH), "right"), (ROWS, 1)).astype(np.int32)
    positions = np.tile(np.arange(LENGTH) - starts[segments[0] - 1], (ROWS, 1)).astype(np.int32)
    segments[::2, 490:] = 0
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": (segments > 0).astype(np.float32),
        "segment_ids": segments,
        "positions": positions,
        "target_bytes": np.ones((ROWS, LENGTH), np.int32),
    }


def _step(mesh_fields, devices, **changes):
    """(loss, gradients, the compiled program's text) of one step."""
    experiment = experiments.from_config(_config(mesh_fields, **changes))
    mesh = meshes.make(experiment.mesh, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        program = programs.step_program(experiment, mesh)
        state, frozen = programs.initialize(program, seed=0)
        host = _batch()
        batch = {name: jax.device_put(host[name], leaf.sharding) for name, leaf in program.batch.items()}
        compiled = program.step.lower(state, frozen, batch).compile()
        state, metrics = compiled(state, frozen, batch)
    return float(metrics["loss"]), tree.flatten(jax.device_get(state["optimizer"]["momentum"])), compiled.as_text()


@pytest.fixture
def with_splash(monkeypatch):
    """The path of a TPU, its kernel interpreted."""
    monkeypatch.setattr(choice, "platform", lambda: "tpu")
    monkeypatch.setattr(kernels, "splash", functools.partial(kernels.splash, interpret=True))


@pytest.mark.parametrize(
    "name, devices, micro_batches, layers, softcap",
    [
        ("sequence=2 tensor=2", 4, 2, 1, 5.0),
        pytest.param("fsdp=2 sequence=2 tensor=2", 8, 2, 2, 0.0, marks=pytest.mark.slow),
        pytest.param("fsdp=2 sequence=2 tensor=2", 8, 1, 2, 5.0, marks=pytest.mark.slow),
        pytest.param("sequence=2, parameters over it", 2, 1, 2, 0.0, marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients_with_exchanged_queries_equal_those_of_one_device(
    name, devices, micro_batches, layers, softcap, with_splash, monkeypatch
):
    model = {"layers": layers, "softcap": softcap}
    loss, gradients, text = _step(MESHES[name], devices, micro_batches=micro_batches, **model)
    assert "collective-permute" in text
    monkeypatch.undo()  # one device goes by the path of a CPU
    expected_loss, expected, _ = _step({"preset": "data"}, 1, **model)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for path, gradient in expected.items():
        largest = np.abs(gradient).max()
        assert largest > 0, path
        assert np.abs(gradients[path] - gradient).max() <= 2e-5 * largest, path
