"""Checkpoints: what was saved comes back on any mesh, in part or whole, and what a caller gets wrong is one line."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from t5x_like.core import tree
from t5x_like.core.errors import UserError
from t5x_like.storage import checkpoint, leaves, streams
from t5x_like.storage.checkpoint import Checkpoints
from t5x_like.storage.model_directory import DamagedCheckpoint
from tests.storage.quantized import CONSTRUCTORS, Quantized


def mesh(rows: int, columns: int) -> Mesh:
    devices = np.array(jax.devices()[: rows * columns]).reshape(rows, columns)
    return Mesh(devices, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def sharded(tree, on: Mesh):
    """Every array over the mesh as far as its dims divide."""
    return jax.tree.map(lambda x: jax.device_put(x, sharding_of(x.shape, on)), tree)


def sharding_of(shape, on: Mesh) -> NamedSharding:
    names = [
        name if size % on.shape[name] == 0 else None for name, size in zip(("fsdp", "tensor"), shape[-2:], strict=False)
    ]
    return NamedSharding(on, PartitionSpec(*[None] * (len(shape) - len(names)), *names))


def template(tree, on: Mesh):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(x.shape, on)), tree)


def make_state(seed: int = 0):
    random = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(random.standard_normal(shape, dtype=np.float32))

    params = {"layers": {"up": normal(2, 8, 16), "norm": normal(2, 8)}, "embed": normal(128, 96)}
    optimizer = jax.tree.map(lambda x: x + normal(*x.shape).astype(x.dtype), optax.adamw(1e-3).init(params))
    return {"params": params, "optimizer": optimizer, "state": {"step": jnp.int32(seed), "spikes": normal(3)}}


def assert_equal_bits(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for first, second in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert first.dtype == second.dtype
        assert np.asarray(first).tobytes() == np.asarray(second).tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with one checkpoint, of step 3, made on a 4 x 2 mesh; its items. Not to be changed."""
    directory = str(tmp_path_factory.mktemp("saved") / "checkpoints")
    state = make_state(3)
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.save(3, sharded(state, mesh(4, 2)), {"config": {"seed": 7}, "provenance": {"from": "test"}})
        assert checkpoints.wait()
    return directory, state


@pytest.mark.parametrize("shape", [(1, 1), (4, 2), (2, 4), (1, 8), (2, 1)])
def test_state_comes_back_bit_for_bit_on_any_mesh(saved, shape):
    directory, state = saved
    wanted = template(state, mesh(*shape))
    with Checkpoints(directory, read_only=True) as checkpoints:
        restored = checkpoints.restore(3, wanted)
    assert_equal_bits(restored, state)
    for leaf, asked in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(asked.sharding, leaf.ndim)


def test_metadata_holds_what_was_given_and_what_was_saved(saved):
    directory, _ = saved
    with Checkpoints(directory, read_only=True) as checkpoints:
        metadata = checkpoints.metadata(3)
        assert checkpoints.steps() == [3] and checkpoints.latest() == 3
    assert metadata["config"] == {"seed": 7} and metadata["provenance"] == {"from": "test"} and metadata["step"] == 3
    assert metadata["arrays"]["params"]["layers/up"] == {"shape": [2, 8, 16], "dtype": "float32"}
    assert set(metadata["fingerprints"]["optimizer"]) == set(metadata["arrays"]["optimizer"])


def test_one_item_or_some_paths_of_it_can_be_restored(saved):
    directory, state = saved
    part = {"layers": {"norm": state["params"]["layers"]["norm"]}}
    with Checkpoints(directory, read_only=True) as checkpoints:
        restored = checkpoints.restore(3, {"params": template(part, mesh(1, 1))})
    assert set(restored) == {"params"}
    assert_equal_bits(restored["params"], part)


def test_another_dtype_is_verified_first_and_then_converted(saved):
    directory, state = saved
    wanted = {"embed": jax.ShapeDtypeStruct((128, 96), jnp.bfloat16)}
    with Checkpoints(directory, read_only=True) as checkpoints:
        restored = checkpoints.restore(3, {"params": wanted})["params"]
    assert_equal_bits(restored, {"embed": state["params"]["embed"].astype(jnp.bfloat16)})


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ({"ema": {}}, "holds no 'ema'; it has optimizer, params, state"),
        ({"params": {"head": jax.ShapeDtypeStruct((1,), jnp.float32)}}, "params has no 'head'; it belongs to another"),
        (
            {"params": {"embed": jax.ShapeDtypeStruct((32, 96), jnp.float32)}},
            r"'embed' is \[128, 96\] there and \[32, 96\] here; use the config",
        ),
    ],
)
def test_a_template_of_another_model_is_one_clear_line_and_no_damage(saved, templates, message):
    directory, _ = saved
    with Checkpoints(directory) as checkpoints, pytest.raises(UserError, match=message) as caught:
        checkpoints.restore_latest(templates)
    assert not isinstance(caught.value, DamagedCheckpoint) and "\n" not in str(caught.value)
    assert Checkpoints(directory, read_only=True).steps() == [3]


def test_a_step_that_is_not_there_is_named(saved):
    with Checkpoints(saved[0], read_only=True) as checkpoints, pytest.raises(UserError, match=r"step 4; it has 3$"):
        checkpoints.restore(4, {"params": {}})


def test_special_leaves_come_back_from_the_record_of_their_kind(tmp_path):
    weight = Quantized(jnp.arange(32, dtype=jnp.int8).reshape(4, 8), jnp.linspace(1, 2, 8)[None], ("embed", "mlp"))
    params = {"layers": {"up": weight, "norm": jnp.ones(4)}}
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(1, {"params": params}, {})
        checkpoints.wait()
        note = checkpoints.metadata(1)
        wanted = leaves.templates(
            note["arrays"]["params"],
            note["kinds"]["params"],
            CONSTRUCTORS,
            sharding=lambda path, shape: None,
            where=str(tmp_path),
        )
        restored = checkpoints.restore(1, {"params": wanted})["params"]
    assert isinstance(restored["layers"]["up"], Quantized) and restored["layers"]["up"].axes == ("embed", "mlp")
    assert_equal_bits(restored, params)


def test_arrays_may_be_donated_while_they_are_saved(tmp_path):
    advance = jax.jit(lambda x: x * 1.5 + 1.0, donate_argnums=0)
    state = sharded(
        {"w": jnp.asarray(np.random.default_rng(1).standard_normal((64, 1024), dtype=np.float32))}, mesh(4, 2)
    )
    expected = jax.tree.map(np.array, state)
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(1, {"params": state}, {})
        for _ in range(20):
            state = {"w": advance(state["w"])}
        checkpoints.wait()
        assert not np.array_equal(state["w"], expected["w"])
        assert_equal_bits(checkpoints.restore(1, {"params": template(expected, mesh(1, 1))})["params"], expected)


def test_old_steps_are_deleted_after_the_commit_and_metrics_are_remembered_over_restarts(tmp_path):
    seen = []

    def keep(steps, metrics):
        seen.append((list(steps), {step: dict(metrics[step]) for step in steps}))
        return {*steps[-2:], min(steps, key=lambda step: metrics[step]["loss"])}

    for steps in ([1, 2, 3], [4, 5]):
        with Checkpoints(str(tmp_path), keep=keep) as checkpoints:
            for step in steps:
                checkpoints.save(
                    step, {"params": {"w": jnp.ones(4)}}, {}, metrics={"loss": abs(step - 2), "bad": np.nan}
                )
    assert seen[-1] == ([2, 3, 4, 5], {2: {"loss": 0}, 3: {"loss": 1}, 4: {"loss": 2}, 5: {"loss": 3}})
    assert Checkpoints(str(tmp_path), read_only=True).steps() == [2, 4, 5]


def test_a_step_that_is_evaluated_after_its_save_is_judged_at_every_later_start(tmp_path):
    """A preemption saves at once and leaves the evaluation to the resume."""
    directory, items = str(tmp_path / "checkpoints"), {"params": {"a": jnp.ones(4)}}
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, items, {}, metrics={})
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.metrics(1) == {}
        checkpoints.judge(1, {"eval/loss": 0.5, "eval/perplexity": float("inf")})
    best = []
    keep = lambda steps, metrics: best.append(dict(metrics)) or list(steps)  # noqa: E731
    with Checkpoints(directory, keep=keep) as checkpoints:
        assert checkpoints.metrics(1) == {"eval/loss": 0.5}
        checkpoints.save(2, items, {}, metrics={"eval/loss": 0.7})
    assert best == [{1: {"eval/loss": 0.5}, 2: {"eval/loss": 0.7}}]
    with Checkpoints(directory, read_only=True) as checkpoints:
        assert_equal_bits(checkpoints.restore(1, items)["params"], items["params"])


def test_a_save_that_is_not_due_is_a_defect_and_never_silently_skipped(tmp_path):
    with Checkpoints(str(tmp_path), asynchronous=False) as checkpoints:
        assert checkpoints.save(2, {"params": {"w": jnp.ones(4)}}, {})
        assert checkpoints.steps() == [2]
        for step in (1, 2):
            with pytest.raises(ValueError, match="already holds"):
                checkpoints.save(step, {"params": {"w": jnp.ones(4)}}, {})
        with pytest.raises(TypeError, match="params/w is no array"):
            checkpoints.save(3, {"params": {"w": 1.0}}, {})


def test_an_item_without_arrays_is_saved_and_restored(tmp_path):
    empty = optax.sgd(1e-3).init({"w": jnp.ones(4)})
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(1, {"params": {"w": jnp.ones(4)}, "optimizer": empty}, {})
        assert checkpoints.restore(1, {"optimizer": empty})["optimizer"] == empty


def test_the_metadata_is_a_file_that_people_can_read(saved):
    with open(f"{saved[0]}/3/metadata/metadata", encoding="utf-8") as file:
        assert json.load(file)["config"] == {"seed": 7}


def test_a_save_lists_the_checkpoints_once_and_reads_each_metadata_at_most_once(tmp_path, monkeypatch):
    """In a bucket each of these is a request: with n checkpoints kept, a listing for each of them made it n^2."""
    from t5x_like.storage import checkpoint as module

    directory = str(tmp_path)
    with Checkpoints(directory) as checkpoints:
        for step in range(1, 6):
            assert checkpoints.save(step, {"params": {"w": jnp.ones(2)}}, {}) and checkpoints.wait()
    counts = {"listings": 0, "metadata": 0}

    def counted(name, function):
        def count(*arguments):
            counts[name] += 1
            return function(*arguments)

        return count

    with Checkpoints(directory, keep=lambda steps, metrics: steps[-6:]) as checkpoints:
        monkeypatch.setattr(module, "committed_steps", counted("listings", module.committed_steps))
        monkeypatch.setattr(module, "read_metadata", counted("metadata", module.read_metadata))
        assert checkpoints.save(6, {"params": {"w": jnp.ones(2)}}, {}) and checkpoints.wait()
        assert counts == {"listings": 1, "metadata": 5}
        assert checkpoints.save(7, {"params": {"w": jnp.ones(2)}}, {}) and checkpoints.wait()
        assert counts == {"listings": 2, "metadata": 5}
        assert checkpoints.steps() == [2, 3, 4, 5, 6, 7]


def test_a_large_array_is_stored_layer_by_layer_and_in_small_chunks(tmp_path, monkeypatch):
    """Whoever reads it a piece at a time never holds a whole array; whoever reads it whole gets the same bits."""
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 4096)
    shapes = {"layers/up": (3, 64, 32), "layers/norm": (3, 64), "embed": (128, 96), "uneven": (131, 96)}
    params = {path: jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape) for path, shape in shapes.items()}
    axes = {path: ["layers" if path.startswith("layers") else None] for path in shapes}
    with Checkpoints(str(tmp_path), asynchronous=False) as checkpoints:
        checkpoints.save(1, {"params": tree.unflatten(params)}, {"axes": {"params": axes}})
        restored = checkpoints.restore(1, {"params": jax.tree.map(_abstract, tree.unflatten(params))})["params"]
    assert_equal_bits(restored, tree.unflatten(params))
    found = {path: leaf.chunk for path, leaf in streams.read_item(str(tmp_path / "1"), "params").items()}
    assert found == {"layers/up": (1, 32, 32), "layers/norm": (3, 64), "embed": (32, 32), "uneven": (131, 96)}


def _abstract(array):
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
