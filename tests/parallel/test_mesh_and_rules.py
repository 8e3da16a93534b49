"""Claims about meshes, the table of rules, and which rows a process reads."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from t5x_like.core.errors import UsageError
from t5x_like.core.types import ArraySpec
from t5x_like.parallel import mesh as meshes
from t5x_like.parallel import rules as tables
from t5x_like.parallel import sharding

PACKAGE = pathlib.Path(tables.__file__).parents[1]
NOTHING = meshes.MeshConfig("fsdp", "", None, None, None, None, None, None, None)


def _config(preset: str = "fsdp", **fields) -> meshes.MeshConfig:
    return dataclasses.replace(NOTHING, preset=preset, **fields)


@pytest.mark.parametrize(
    "preset,expected",
    [
        ("data", {"data": 8}),
        ("fsdp", {"fsdp": 8}),
        ("fsdp_tensor", {"fsdp": 4, "tensor": 2}),
        ("fsdp_tensor_sequence", {"fsdp": 2, "sequence": 2, "tensor": 2}),
    ],
)
def test_presets_fill_the_devices_and_all_axes_are_auto(preset, expected):
    mesh = meshes.make(_config(preset))
    assert {name: size for name, size in mesh.shape.items() if size > 1} == expected
    assert mesh.axis_names == tables.MESH_AXES
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    "config,message",
    [
        (_config("fdsp"), "did you mean 'fsdp'"),
        (_config(tensor=3), "tensor=3 = 3 does not divide the 8 devices"),
        (_config(fsdp=2, tensor=2), "fsdp=2 x tensor=2 = 4, but there are 8 devices"),
        (_config(data=-1), "only one axis can be -1"),
        (_config(tensor=0), "config.mesh.tensor=0 should be a positive number"),
        (
            _config(stage=2, rules="layers=, batch=slice+data+fsdp+expert"),
            "stage=2, but no rule places anything on 'stage': its 2 parts would all do the same work",
        ),
        (_config(sequence=2, rules="length="), "sequence=2, but no rule places anything on 'sequence'"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_in_one_line(config, message):
    with pytest.raises(UsageError, match=message):
        meshes.make(config)


def test_slices_are_joined_along_slice_or_along_stages():
    sizes = dict.fromkeys(tables.MESH_AXES, 1)
    assert meshes.across_slices(sizes | {"slice": 2, "stage": 2}, 2) == "slice"
    assert meshes.across_slices(sizes | {"stage": 4}, 2) == "stage"
    with pytest.raises(UsageError, match="slices; set config.mesh.slice=2, or config.mesh.slice=1 and"):
        meshes.across_slices(sizes | {"stage": 3}, 2)


def test_slices_are_the_slowest_axis():
    mesh = meshes.make(_config("fsdp", slice=2, tensor=2))
    ids = np.vectorize(lambda device: device.id)(mesh.devices).reshape(2, 2, 2)
    assert ids.tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


SIZES = {"data": 2, "fsdp": 4, "tensor": 8}


def test_every_rule_names_axes_of_the_mesh():
    assert {axis for axes in tables.TABLE.values() for axis in axes} <= set(tables.MESH_AXES)
    assert all(set(shape) <= set(tables.MESH_AXES) for shape in tables.PRESETS.values())


def test_every_activation_axis_of_the_table_is_named_where_activations_are():
    sources = [path.read_text() for name in ("layers", "models") for path in (PACKAGE / name).rglob("*.py")]
    named = {axis for axis in tables.TABLE if any(f'"{axis}"' in source for source in sources)}
    assert {axis for axis in tables.TABLE if axis.startswith("act_")} <= named


def test_an_axis_that_a_rule_names_is_not_idle():
    assert meshes.axis_sizes(_config(stage=2), 8)["stage"] == 2
    assert meshes.axis_sizes(_config(stage=2, rules="layers="), 8)["stage"] == 2  # as data parallelism


def test_what_does_not_divide_is_an_error_with_the_numbers_except_kv_heads():
    rules = tables.rules()
    assert rules.spec(("embed", "heads", "head"), (8, 16, 3), SIZES) == PartitionSpec(("fsdp",), ("tensor",), None)
    with pytest.raises(UsageError, match=r"'heads' of size 12 is not divisible by its 8 shards \(tensor=8\)"):
        rules.spec(("embed", "heads", "head"), (8, 12, 3), SIZES)
    assert rules.spec(("embed", "kv_heads", "head"), (8, 2, 3), SIZES) == PartitionSpec(("fsdp",), None, None)
    assert rules.replicated_heads(2, SIZES) and not rules.replicated_heads(8, SIZES)


def test_one_mesh_axis_cannot_shard_two_dims():
    rules = tables.rules("head=tensor")
    with pytest.raises(UsageError, match="'tensor' would shard both 'heads' and 'head'"):
        rules.spec(("heads", "head"), (8, 8), SIZES)


@pytest.mark.parametrize(
    "text,message",
    [
        ("mpl=tensor", "did you mean 'mlp'"),
        ("mlp=tensro", "did you mean 'tensor'"),
        ("mlp", "should read AXIS="),
        ("mlp=tensor", "changes nothing"),
    ],
)
def test_overrides_with_unknown_names_or_no_effect_are_refused(text, message):
    with pytest.raises(UsageError, match=message):
        tables.rules(text)


def test_an_override_of_an_axis_that_no_parameter_has_is_found():
    assert tables.unused(tables.rules("experts=fsdp, mlp="), ["mlp", "embed"]) == ["experts"]


def test_changed_rules_on_one_mesh_give_other_shardings():
    mesh = meshes.make(_config("fsdp_tensor"))

    def place(rules: tables.Rules):
        def function(x):
            with sharding.use_rules(rules):
                return sharding.constrain(x * 2, "batch", "length", "act_mlp")

        with jax.set_mesh(mesh):
            return jax.jit(function)(jnp.ones((8, 4, 6))).sharding.spec

    assert place(tables.rules()) == PartitionSpec("fsdp", None, "tensor")
    assert place(tables.rules("act_mlp=")) == PartitionSpec("fsdp")


def test_shards_of_an_activation_are_those_of_the_rules_and_one_where_nothing_is_placed():
    with sharding.use_rules(tables.rules()):
        assert sharding.shards("length", 16) == 1
        with jax.set_mesh(meshes.make(_config("fsdp_tensor_sequence"))):
            assert sharding.shards("length", 16) == 2
            assert sharding.shards("length", 1) == 1  # one decoded token
            assert sharding.shards("batch", 16) == 2
            with sharding.use_rules(tables.rules("length=, batch=fsdp+sequence")):
                assert sharding.shards("length", 16) == 1
                assert sharding.shards("batch", 16) == 4


def test_constrain_is_the_identity_without_a_mesh_and_inside_a_shard_map():
    rules = tables.rules()
    x = jnp.ones((8, 4, 6))
    with sharding.use_rules(rules):
        assert sharding.constrain(x, "batch", "length", "act_embed") is x
    mesh = meshes.make(_config())

    def inside(x):
        with sharding.use_rules(rules):
            return sharding.constrain(x, "batch", "length", "act_embed")

    with jax.set_mesh(mesh):
        spec = PartitionSpec("fsdp")
        mapped = jax.jit(jax.shard_map(inside, in_specs=spec, out_specs=spec))(x)
    np.testing.assert_array_equal(mapped, x)


@pytest.mark.parametrize("preset", tables.PRESETS)
def test_a_batch_assembled_from_needed_rows_is_the_whole_batch(preset):
    mesh = meshes.make(_config(preset))
    specs = {
        "inputs": ArraySpec((8, 16), "int32", ("batch", "length")),
        "pairs": ArraySpec((8, 2, 16), "int32", ("batch", None, "length")),
        "scores": ArraySpec((8, 3), "float32", ("batch", None)),
        "reward": ArraySpec((8,), "float32", ("batch",)),
    }
    arrays = sharding.abstract_batch(mesh, tables.rules(), specs)
    rows = sharding.addressable_rows(arrays)
    np.testing.assert_array_equal(rows, np.arange(8))
    whole = {name: np.arange(np.prod(spec.shape), dtype=spec.dtype).reshape(spec.shape) for name, spec in specs.items()}
    batch = sharding.global_batch(
        lambda wanted: {name: array[wanted] for name, array in whole.items()}, rows=rows, arrays=arrays
    )
    for name, array in whole.items():
        np.testing.assert_array_equal(batch[name], array)
        assert batch[name].sharding == arrays[name].sharding
