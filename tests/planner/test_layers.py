"""What the real TPU compiler makes of layers: how often kernels run under each remat policy, what stays divided."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest

from t5x_like.core.dtypes import DtypePolicy
from t5x_like.layers.remat import POLICIES
from t5x_like.models.model import Model
from t5x_like.parallel import mesh as meshes
from t5x_like.parallel.pipeline import PipelineConfig, Schedule
from t5x_like.parallel.rules import rules
from t5x_like.parallel.sharding import named
from t5x_like.planner.compile import compile_program
from t5x_like.planner.time.cost import cost
from t5x_like.planner.topology import topology
from tests.models import cases

LAYERS = 3
# Of the forward kernel: once where its results are saved, again where they are computed again.
FORWARD = {"none": 1, "dots": 1, "products": 1, "minimal": 1, "context": 1, "full": 2, "q+context@host": 1}


def test_every_policy_is_counted():
    assert set(POLICIES) < set(FORWARD)


def gradients(remat, *, layers=LAYERS, rows=4, pipeline=None, overrides="", **axes):
    """(text, mesh) of the gradient of a small decoder on four chips."""
    names = ("slice", "stage", "data", "fsdp", "expert", "sequence", "tensor")
    sizes = meshes.MeshConfig("fsdp", overrides, **{name: axes.get(name) for name in names})
    mesh = meshes.make(sizes, topology("v5e:2x2").devices)
    sizes = {"layers": layers, "width": 128, "heads": 2, "kv_heads": 1, "head_size": 128, "max_length": 128}
    config = dataclasses.replace(cases.config("llama", **sizes), remat=remat)
    model = Model(config, rules(overrides), DtypePolicy("float32", "bfloat16"), pipeline)

    def abstract(shape, dtype, axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=named(mesh, model.rules, axes, shape))

    is_spec = lambda leaf: hasattr(leaf, "init")  # noqa: E731
    params = jax.tree.map(lambda s: abstract(s.shape, s.dtype, s.axes), model.specs(), is_leaf=is_spec)
    batch = {"inputs": abstract((rows, 128), jnp.int32, ("batch", "length"))}

    def loss(params, batch):
        return jnp.square(model.apply(params, batch).hidden_BTD.astype(jnp.float32)).sum()

    return compile_program(jax.jit(jax.grad(loss)), (params, batch), mesh=mesh).text, mesh


@pytest.mark.parametrize("remat", FORWARD)
def test_the_attention_kernel_runs_once_a_layer_where_its_results_are_saved(compiler, remat):
    text, mesh = gradients(remat)
    counts = {kernel.name: kernel.count for kernel in cost(text, dict(mesh.shape)).kernels}
    (forward,) = (count for name, count in counts.items() if "_fwd" in name)
    backward = {name: count for name, count in counts.items() if "_fwd" not in name}
    assert forward == FORWARD[remat] * LAYERS
    assert len(backward) == 2 and set(backward.values()) == {LAYERS}


@pytest.mark.parametrize("axes", [{"fsdp": 2, "tensor": 2}, {"fsdp": 2, "sequence": 2}], ids=["width", "length"])
def test_what_passes_from_layer_to_layer_stays_divided(compiler, axes):
    """A device has a quarter of it. The compiler would gather all, if the layout of the whole were pinned."""
    text, _ = gradients("full", overrides="act_embed=tensor", **axes)
    shapes = {
        shape for line in text.splitlines() if "layers" in line for shape in re.findall(r"bf16\[([\d,]+)\]", line)
    }
    sizes = {math.prod(map(int, shape.split(","))) for shape in shapes}
    assert 4 * 128 * 128 // 4 in sizes
    assert 4 * 128 * 128 not in sizes


@pytest.mark.parametrize(
    "axis,overrides",
    [
        ("fsdp", ""),
        pytest.param("tensor", "act_embed=tensor", marks=pytest.mark.slow),
        pytest.param("sequence", "", marks=pytest.mark.slow),
    ],
)
def test_in_the_turns_of_a_pipeline_stages_exchange_what_they_hand_on_and_nothing_else(compiler, axis, overrides):
    """The layout of all stages, pinned, would have each gather what the others hold, in every layer."""
    schedule, rows = Schedule(stages=2, micro_batches=2, repeats=1), 8
    pipeline = PipelineConfig(schedule.micro_batches, schedule.repeats)
    axes = {"fsdp": 1, "stage": 2} | {axis: 2}
    text, mesh = gradients("full", layers=2, rows=rows, pipeline=pipeline, overrides=overrides, **axes)
    every_turn = [item for item in cost(text, dict(mesh.shape)).collectives if item.count == schedule.turns]
    micro_batch = rows // schedule.micro_batches * 128 * 128 * 2  # bytes
    between = [item for item in every_turn if "stage" in item.axes]
    handed_on = ("collective-permute", ("stage",), micro_batch // 2)  # by each of two devices, forward and backward
    assert [(item.kind, item.axes, item.bytes_each) for item in between] == 2 * [handed_on]
    gathered = [item.bytes_each for item in every_turn if item.kind == "all-gather"]
    assert gathered
    if axis == "fsdp":  # weights; along the others attention and products read whole rows
        assert max(gathered) < micro_batch
