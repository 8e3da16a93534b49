"""Claims about the train step that hold for any objective, shown on a small one with two kinds of terms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from t5x_like.core import config as bridge
from t5x_like.core.types import ArraySpec, ParamSpec
from t5x_like.objectives.interface import Objective
from t5x_like.optim import optimizers
from t5x_like.parallel import mesh as meshes
from t5x_like.parallel import rules as tables
from t5x_like.parallel import sharding
from t5x_like.training import state as train_state
from t5x_like.training import step as step_module
from t5x_like.training.step import StepConfig, make_step

RULES = tables.rules()
AXES = {"w": ("embed", "mlp")}


def _weights(batch):
    sequences = jnp.max(batch["loss_weights"], axis=1)
    return {"tokens": jnp.sum(batch["loss_weights"]), "sequences": jnp.sum(sequences)}


def _loss(params, frozen, batch, key, totals):
    """A term over tokens and one over sequences, with different weights."""
    out_BTF = jnp.tanh(batch["inputs"][..., None] * params["w"][0][None, None, :]) @ params["w"].T
    token_BT = jnp.mean(jnp.square(out_BTF - batch["targets"][..., None]), axis=-1)
    tokens = jnp.sum(batch["loss_weights"] * token_BT)
    sequence_B = jnp.square(jnp.mean(out_BTF, axis=(1, 2)) - 1) * jnp.max(batch["loss_weights"], axis=1)
    sums = {"loss": (tokens, jnp.sum(batch["loss_weights"])), "sequence": (jnp.sum(sequence_B), 1.0 * len(sequence_B))}
    scalar = tokens / totals["tokens"] + 0.3 * jnp.sum(sequence_B) / totals["sequences"]
    return scalar, sums


def _nothing(params, frozen, batch):
    return {}


INPUTS = {name: ArraySpec((16, 4), "float32", ("batch", "length")) for name in ("inputs", "targets", "loss_weights")}
OBJECTIVE = Objective(_weights, _loss, _nothing, INPUTS)


SPECS = {"w": ParamSpec((8, 8), "float32", AXES["w"], "zeros")}


def sgd(rate: float = 0.1, specs=SPECS) -> optimizers.Optimizer:
    config = common.config().optim.unlock()
    config.update({"name": "sgd", "learning_rate": rate, "weight_decay": 0.0, "decay": ((".*", 0.0),)})
    config.schedule.update({"name": "constant", "warmup_steps": 0, "steps": 10})
    config.sgd.momentum = 0.0
    built = bridge.build(optimizers.OptimConfig, config, path="config.optim")
    return optimizers.build(built, specs=specs, total_steps=10)


def _batch(rows: int = 16, length: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows with different numbers of weighted tokens, among them one with none."""
    rng = np.random.default_rng(seed)
    weights = (rng.random((rows, length)) < np.linspace(0, 1, rows)[:, None]).astype(np.float32)
    return {
        "inputs": rng.normal(size=(rows, length)).astype(np.float32),
        "targets": rng.normal(size=(rows, length)).astype(np.float32),
        "loss_weights": weights,
    }


def config(**changes) -> StepConfig:
    values = dict(
        micro_batches=1,
        clip_norm=None,
        ema_decay=None,
        spike_deviations=None,
        spike_memory=0.9,
        spike_warmup=3,
        dropout=False,
        seed=0,
    )
    return StepConfig(**(values | changes))


def _fresh(ema: bool = False):
    w = jax.random.normal(jax.random.key(0), (8, 8))
    return train_state.fresh({"w": w}, sgd(), ema=ema)


def _run(config: StepConfig, batch, state=None, mesh=None, objective=OBJECTIVE):
    step = jax.jit(make_step(objective, sgd(), rules=RULES, param_axes=AXES, config=config))
    state = _fresh(config.ema_decay is not None) if state is None else state
    if mesh is None:
        return step(state, {"base": {}}, batch)
    placed = sharding.named(mesh, RULES, AXES["w"], (8, 8))
    state = state | {"params": {"w": jax.device_put(state["params"]["w"], placed)}}
    shardings = sharding.batch_shardings(mesh, RULES, objective.inputs)
    batch = {name: jax.device_put(value, shardings[name]) for name, value in batch.items()}
    with jax.set_mesh(mesh):
        return step(state, {"base": {}}, batch)


@pytest.fixture(scope="module")
def reference():
    return _run(config(), _batch())


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_micro_batches_change_nothing_though_terms_have_different_weights(reference, micro_batches):
    state, metrics = _run(config(micro_batches=micro_batches), _batch())
    assert float(jnp.abs(reference[0]["params"]["w"] - _fresh()["params"]["w"]).max()) > 1e-3
    np.testing.assert_allclose(state["params"]["w"], reference[0]["params"]["w"], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(metrics["loss"], reference[1]["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], reference[1]["grad_norm"], rtol=1e-6)


def _candidates():
    """Pairs of texts [B, 2, T], scores of 3 candidates [B, 3] and a reward [B]: (objective, batch)."""
    specs = {
        "pairs": ArraySpec((16, 2, 4), "float32", ("batch", None, "length")),
        "scores": ArraySpec((16, 3), "float32", ("batch", None)),
        "reward": ArraySpec((16,), "float32", ("batch",)),
    }

    def loss(params, frozen, batch, key, totals):
        pairs_BT = batch["pairs"].reshape(-1, batch["pairs"].shape[-1])  # the two texts of a row, one below the other
        out_BT = jnp.tanh(pairs_BT @ params["w"][:4, :4])
        margin_B = jnp.diff(out_BT.mean(axis=-1).reshape(-1, 2), axis=-1)[:, 0]
        wanted_B = jax.nn.softmax(batch["scores"] @ params["w"][:3, :3])[:, 0] + batch["reward"]
        total = jnp.sum(jnp.square(margin_B - wanted_B))
        count = jnp.float32(len(margin_B))
        return total / totals["pairs"], {"margin": (total, count), "loss": (jnp.float32(jnp.nan), count)}

    rng = np.random.default_rng(0)
    batch = {name: rng.normal(size=spec.shape).astype(np.float32) for name, spec in specs.items()}
    weights = lambda batch: {"pairs": jnp.float32(batch["reward"].shape[0])}  # noqa: E731
    return Objective(weights, loss, _nothing, specs, judge="margin"), batch


@pytest.mark.parametrize("preset", tables.PRESETS)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_arrays_of_any_rank_lie_as_declared_and_train_alike_on_every_mesh(preset, micro_batches):
    objective, batch = _candidates()
    expected, _ = _run(config(), batch, objective=objective)
    assert float(jnp.abs(expected["params"]["w"] - _fresh()["params"]["w"]).max()) > 1e-4
    mesh = meshes.make(meshes.MeshConfig(preset, "", *(None,) * 7))
    state, metrics = _run(config(micro_batches=micro_batches), batch, mesh=mesh, objective=objective)
    np.testing.assert_allclose(state["params"]["w"], expected["params"]["w"], rtol=1e-5, atol=1e-6)
    # The margin is judged: a metric "loss" that is not finite refuses nothing.
    assert float(metrics["finite"]) == 1 and float(metrics["skipped"]) == 0


@pytest.mark.parametrize("preset", tables.PRESETS)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_sharding_changes_nothing_though_terms_have_different_weights(reference, preset, micro_batches):
    mesh = meshes.make(meshes.MeshConfig(preset, "", *(None,) * 7))
    state, metrics = _run(config(micro_batches=micro_batches), _batch(), mesh=mesh)
    np.testing.assert_allclose(state["params"]["w"], reference[0]["params"]["w"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], reference[1]["loss"], rtol=1e-6)


def test_a_batch_without_weights_skips_the_update_and_records_it():
    batch = _batch()
    batch["loss_weights"] = np.zeros_like(batch["loss_weights"])
    state, metrics = _run(config(), batch)
    np.testing.assert_array_equal(state["params"]["w"], _fresh()["params"]["w"])
    assert float(metrics["skipped"]) == 1 and int(state["progress"]["skipped"]) == 1
    assert int(state["progress"]["step"]) == 1


def test_a_loss_that_is_not_finite_skips_the_update_but_the_step_advances():
    batch = _batch()
    batch["inputs"] = batch["inputs"].copy()
    batch["inputs"][15, 3] = np.nan
    state, metrics = _run(config(ema_decay=0.5), batch)
    np.testing.assert_array_equal(state["params"]["w"], _fresh()["params"]["w"])
    np.testing.assert_array_equal(state["ema"]["w"], _fresh()["params"]["w"])
    assert float(metrics["finite"]) == 0 and float(metrics["skipped"]) == 1
    assert int(state["progress"]["step"]) == 1


def test_a_spike_is_refused_only_after_the_warmup_and_does_not_enter_the_statistics():
    limited = config(spike_deviations=4.0)
    step = jax.jit(make_step(OBJECTIVE, sgd(0.0), rules=RULES, param_axes=AXES, config=limited))
    spiky = _batch()
    spiky["targets"] = spiky["targets"] + 30
    state, metrics = step(_fresh(), {"base": {}}, spiky)
    assert float(metrics["spike"]) == 0  # the statistics are not warm
    state = _fresh()
    for seed in range(4):
        state, metrics = step(state, {"base": {}}, _batch(seed=seed))
        assert float(metrics["spike"]) == 0
    before = state
    state, metrics = step(state, {"base": {}}, spiky)
    assert float(metrics["spike"]) == 1 and float(metrics["skipped"]) == 1
    for name in ("loss_mean", "loss_variance", "loss_count"):
        np.testing.assert_array_equal(state["progress"][name], before["progress"][name])
    assert int(state["progress"]["step"]) == 5


def test_the_running_average_follows_its_definition():
    state, _ = _run(config(ema_decay=0.75), _batch())
    expected = 0.75 * _fresh()["params"]["w"] + 0.25 * state["params"]["w"]
    np.testing.assert_allclose(state["ema"]["w"], expected, rtol=1e-6)


def test_clipping_limits_the_gradient_and_reports_its_norm_before():
    free, metrics_free = _run(config(), _batch())
    clipped, metrics = _run(config(clip_norm=0.01), _batch())
    assert float(metrics_free["grad_norm"]) > 0.01
    np.testing.assert_allclose(metrics["grad_norm"], metrics_free["grad_norm"], rtol=1e-6)
    change = jnp.linalg.norm(clipped["params"]["w"] - _fresh()["params"]["w"])
    np.testing.assert_allclose(change, 0.1 * 0.01, rtol=1e-3)


def test_micro_batches_draw_different_keys_and_repeat_for_the_same_seed_and_step():
    def noisy(params, frozen, batch, key, totals):
        noise = jax.random.normal(key, ())
        return params["w"][0, 0] * noise, {"loss": (noise, jnp.float32(1))}

    objective = Objective(lambda batch: {"tokens": jnp.float32(1)}, noisy, _nothing, INPUTS)
    one = _run(config(dropout=True), _batch(), objective=objective)[1]["loss"]
    same = _run(config(dropout=True), _batch(), objective=objective)[1]["loss"]
    two = _run(config(dropout=True, micro_batches=2), _batch(), objective=objective)[1]["loss"]
    other = _run(config(dropout=True, seed=1), _batch(), objective=objective)[1]["loss"]
    assert one == same and one != other and one != two


def test_gradients_of_bfloat16_parameters_add_up_in_float32():
    """A large part and 255 small ones, each lost if added in bfloat16."""
    rows = jnp.asarray([1.0] + [1 / 512] * 255)[:, None]

    def part(micro, index):
        return {"w": micro["inputs"].sum(axis=0).astype(jnp.bfloat16)}, {"loss": micro["inputs"].sum()}

    grads, sums = jax.jit(lambda batch: step_module._accumulate(part, batch, {"inputs": ("batch", None)}, 256))(
        {"inputs": rows}
    )
    assert grads["w"].dtype == jnp.float32 and float(grads["w"][0]) == 1 + 255 / 512
    assert float(sums["loss"]) == 1 + 255 / 512


def test_parameters_keep_their_type_from_step_to_step():
    """Bfloat16 parameters with float32 updates: the compiled step must take what it has returned."""
    state = _fresh()
    state["params"] = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state["params"])
    changed, _ = _run(config(), _batch(), state)
    assert changed["params"]["w"].dtype == jnp.bfloat16 and (changed["params"]["w"] != state["params"]["w"]).any()
