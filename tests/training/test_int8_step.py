"""The train step with matrices of layers multiplied in int8: which, near what, and the same again."""

import jax
import numpy as np
import pytest

from configs.pretrain import test as test_config
from t5x_like.core import tree
from t5x_like.core.errors import UsageError
from t5x_like.parallel import mesh as meshes
from t5x_like.runs import program as programs
from t5x_like.runs import train as experiments

ROWS, LENGTH = 8, 32


def _run(products, mesh_fields=None, devices=1, *, steps=1, **loop):
    """(losses, gradients of the last step, the program as it is lowered) of one batch, again and again."""
    config = test_config.get_config()
    config.model.dtype.products = products
    config.data.update({"batch_size": ROWS, "length": LENGTH})
    config.optim.update({"name": "sgd", "learning_rate": 0.0, "weight_decay": 0.0, "clip_norm": 0.0})
    config.optim.sgd.momentum = 0.0
    config.loop.update(loop)
    config.runtime.compiler_options.cpu = {"xla_backend_optimization_level": 0}
    config.mesh.update(mesh_fields or {"preset": "data"})
    experiment = experiments.from_config(config)
    mesh = meshes.make(experiment.mesh, jax.devices()[:devices])
    draw = np.random.default_rng(0)
    host = {name: draw.integers(0, 256, (ROWS, LENGTH)).astype(np.int32) for name in ("inputs", "targets")}
    ones = np.ones((ROWS, LENGTH), np.int32)
    host |= {"loss_weights": ones.astype(np.float32), "segment_ids": ones, "target_bytes": ones}
    host["positions"] = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    with jax.set_mesh(mesh):
        program = programs.step_program(experiment, mesh)
        state, frozen = programs.initialize(program, seed=0)
        batch = {name: jax.device_put(host[name], leaf.sharding) for name, leaf in program.batch.items()}
        lowered = program.step.lower(state, frozen, batch)
        compiled, rows = lowered.compile(), []
        for _ in range(steps):
            state, metrics = compiled(state, frozen, batch)
            rows.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return rows, tree.flatten(jax.device_get(state["params"])), lowered.as_text()


def test_products_in_int8_train_like_others_and_alike_each_time():
    """Parameters do not move here (the rate is 0): losses are equal, and only the rounding of gradients is not."""
    (exact,), _, plain = _run("compute")
    assert "xi8>" not in plain
    (forward,), _, text = _run("int8_forward")
    assert "xi8>" in text
    both, _, _ = _run("int8", steps=2)
    assert exact[0] != forward[0] == pytest.approx(exact[0], rel=1e-3)
    assert [loss for loss, _ in both] == [forward[0]] * 2
    norms = [exact[1], forward[1], *(norm for _, norm in both)]
    assert len(set(norms)) == 4 and norms == pytest.approx([exact[1]] * 4, rel=0.02)
    assert _run("int8", steps=2)[0] == both


def test_they_do_on_a_mesh_with_micro_batches():
    (exact,), _, _ = _run("int8")
    mesh = {"preset": "fsdp_tensor", "fsdp": 2, "tensor": 2}
    (row,), _, text = _run("int8", mesh, 4, micro_batches=2)
    assert "xi8>" in text
    assert row == pytest.approx(exact, rel=5e-3)


def test_an_unknown_name_is_an_error():
    with pytest.raises(UsageError, match="products='int4' is unknown; use one of compute, int8_forward, int8"):
        _run("int4")
