"""The train step with matrices of layers multiplied in int8: which, near what, and the same again."""

import functools

import jax
import numpy as np
import pytest

from configs.pretrain import test as test_config
from t5x_like.core.errors import UsageError
from t5x_like.parallel import mesh as meshes
from t5x_like.runs import program as programs
from t5x_like.runs import train as experiments

ROWS, LENGTH = 8, 32


@functools.cache
def _run(products, mesh_fields=(("preset", "data"),), devices=1, micro_batches=1):
    """((loss, gradient norm) of two steps with one batch, the same of a second start, the program as lowered)."""
    config = test_config.get_config()
    config.model.dtype.products = products
    config.model.decoder.update({"layers": 2})
    config.data.update({"batch_size": ROWS, "length": LENGTH})
    config.optim.update({"name": "sgd", "learning_rate": 0.0, "weight_decay": 0.0, "clip_norm": 0.0})
    config.optim.sgd.momentum = 0.0
    config.loop.micro_batches = micro_batches
    config.runtime.compiler_options.cpu = {"xla_backend_optimization_level": 0}
    config.mesh.update(dict(mesh_fields))
    experiment = experiments.from_config(config)
    mesh = meshes.make(experiment.mesh, jax.devices()[:devices])
    draw = np.random.default_rng(0)
    host = {name: draw.integers(0, 256, (ROWS, LENGTH)).astype(np.int32) for name in ("inputs", "targets")}
    ones = np.ones((ROWS, LENGTH), np.int32)
    host |= {"loss_weights": ones.astype(np.float32), "segment_ids": ones, "target_bytes": ones}
    host["positions"] = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    with jax.set_mesh(mesh):
        program = programs.step_program(experiment, mesh)
        batch = {name: jax.device_put(host[name], leaf.sharding) for name, leaf in program.batch.items()}
        lowered = program.step.lower(program.layout.state, program.layout.frozen, batch)
        compiled, starts = lowered.compile(), []
        for _ in range(2):
            (state, frozen), rows = programs.initialize(program, seed=0), []
            for _ in range(2):
                state, metrics = compiled(state, frozen, batch)
                rows.append((float(metrics["loss"]), float(metrics["grad_norm"])))
            starts.append(rows)
    return *starts, lowered.as_text()


def test_products_in_int8_train_like_others_and_alike_each_time():
    """Parameters do not move here (the rate is 0): losses are equal, and only the rounding of gradients is not."""
    (exact, _), _, plain = _run("compute")
    assert "xi8>" not in plain
    (forward, second), _, text = _run("int8_forward")
    assert "xi8>" in text and forward == second
    both, again, _ = _run("int8")
    assert exact[0] != forward[0] == pytest.approx(exact[0], rel=1e-3)
    assert [loss for loss, _ in both] == [forward[0]] * 2
    norms = [exact[1], forward[1], *(norm for _, norm in both)]
    assert len(set(norms)) == 4 and norms == pytest.approx([exact[1]] * 4, rel=0.02)
    assert both == again


def test_they_do_on_a_mesh_with_micro_batches():
    (exact, _), _, _ = _run("int8")
    (row, _), _, text = _run("int8", (("preset", "fsdp_tensor"), ("fsdp", 2), ("tensor", 2)), 4, micro_batches=2)
    assert "xi8>" in text
    assert row == pytest.approx(exact, rel=5e-3)


def test_the_forward_pass_in_int8_runs_in_stages():
    (exact, _), _, _ = _run("int8_forward")
    (row, _), _, text = _run("int8_forward", (("stage", 2), ("fsdp", 2)), 4)
    assert "xi8>" in text
    assert row == pytest.approx(exact, rel=5e-3)


def test_an_unknown_name_is_an_error():
    with pytest.raises(UsageError, match="products='int4' is unknown; use one of compute, int8_forward, int8"):
        _run("int4")
