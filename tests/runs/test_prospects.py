"""What is known of a point before a compile: that the two ways to count its memory agree, and what is refused."""

import dataclasses
import re

import jax
import pytest

from t5x_like.core import accelerators
from t5x_like.core.errors import UsageError
from t5x_like.parallel.rules import MESH_AXES
from t5x_like.planner.search import analytic, space
from t5x_like.planner.search.step import memory
from t5x_like.runs.footprint import Footprints
from t5x_like.runs.prospects import Prospects

ROWS = ["--config=configs/pretrain/llama3_8b.py", "--config.data.batch_size=32"]
DEVICE = analytic.device(accelerators.parse("v5e:2x4"))


@pytest.fixture(scope="module")
def llama():
    return Prospects(ROWS, jax.devices()[:8], own_options=True), Footprints(platform="tpu", kind="TPU v5")


@pytest.mark.parametrize(
    ("remat", "others"),
    [
        ("full", {}),
        ("products", {}),
        ("minimal:0.5,full", {}),
        ("context", {"config.mesh.tensor": 2}),
        ("minimal", {"config.loop.micro_batches": 2}),
        ("none", {}),
    ],
)
def test_the_search_counts_memory_as_the_footprint_does(llama, remat, others):
    """One is a sum over sizes, the other is read off the traced step: within a tenth, state and gradients exactly."""
    prospects, footprints = llama
    point = space.Point("x", {"config.model.remat": remat, **others})
    step = prospects.step(point)
    counted, found = memory(step), footprints.of(_experiment(prospects, remat, others), step.sizes)
    assert counted["weights"] + counted["optimizer"] == found.parameters + found.optimizer
    assert counted["gradients"] == found.gradients
    assert sum(counted.values()) == pytest.approx(found.total, rel=0.10)


def _experiment(prospects, remat, others):
    base = prospects.base
    tensor, parts = others.get("config.mesh.tensor"), others.get("config.loop.micro_batches", 1)
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, remat=remat),
        mesh=dataclasses.replace(base.mesh, tensor=tensor),
        loop=dataclasses.replace(base.loop, micro_batches=parts),
    )


def test_blocks_are_searched_for_rows_that_the_kernel_serves(llama):
    assert llama[0].around.lengths == (4096,) and llama[0].around.attention_block == 1024
    small = Prospects(["--config=configs/pretrain/t5_tiny.py"], jax.devices()[:8], own_options=True)
    assert small.around.lengths == ()  # relative positions are a bias, which it does not know


@pytest.mark.parametrize("block", [128, 1024])
def test_the_kernels_of_a_step_have_the_blocks_of_the_config(block):
    """A row of 512 tokens: blocks of 512 where 1024 are allowed."""
    given = ["--config=configs/pretrain/test.py", "--config.data.length=512", "--config.model.max_length=512"]
    base = Prospects([*given, f"--config.model.attention_block={block}"], jax.devices()[:1], own_options=True).base
    sizes = dict.fromkeys(MESH_AXES, 1)
    program = Footprints(platform="tpu", kind="TPU v5").program(base, sizes)
    layout = program.layout
    with jax.sharding.use_abstract_mesh(program.mesh):
        text = str(program.step.trace(layout.state, layout.frozen, program.batch).jaxpr)
    assert set(re.findall(r"block_(?:q|kv)(?:_dq|_dkv)?\W+(\d+)", text)) == {str(min(block, 512))}


@pytest.mark.parametrize("block", [0, 64, 200, -128])
def test_a_block_that_no_kernel_has_is_one_line(block):
    given = ["--config=configs/pretrain/test.py", f"--config.model.attention_block={block}"]
    with pytest.raises(UsageError) as error:
        Prospects(given, jax.devices()[:1], own_options=True)
    assert str(error.value) == f"config.model.attention_block={block} should be a multiple of 128"


def test_other_blocks_change_the_time_of_attention_alone(llama):
    seconds = []
    for block in (1024, 512):
        problem, found = llama[0].look(space.Point("x", {"config.model.attention_block": block}), DEVICE)
        assert problem == "" and found is not None
        seconds.append(found.seconds)
    assert seconds[1]["attention"] > seconds[0]["attention"]
    assert {part for part in seconds[0] if seconds[0][part] != seconds[1][part]} <= {"attention", "exposed", "host"}


@pytest.mark.parametrize("remat", ["products:0.5,context", "q@host+k@host+v@host+context@host"])
def test_points_of_stages_with_shares_or_the_host_are_refused_in_one_line(llama, remat):
    point = space.Point("x", {"config.model.remat": remat, "config.mesh.stage": 4})
    problem, found = llama[0].look(point, DEVICE)
    assert found is None and "\n" not in problem
    assert "with config.mesh.stage=4 all layers save the same on their device" in problem
