"""The schedule of pipeline stages, counted turn by turn, and the loop that follows it, with toy stretches."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from t5x_like.core.errors import UsageError
from t5x_like.layers import stack
from t5x_like.layers.dropout import _times, dropout
from t5x_like.parallel import pipeline as pipelines
from t5x_like.parallel.pipeline import PipelineConfig, Schedule
from t5x_like.parallel.rules import rules
from tests.layers.test_stack import kinds_of, toy

SCHEDULES = [
    Schedule(2, 2, 1),
    Schedule(4, 3, 1),
    Schedule(4, 6, 1),
    Schedule(2, 4, 3),
    Schedule(4, 4, 2),
    Schedule(3, 6, 2),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_every_micro_batch_passes_every_stretch_in_order_and_the_bubble_is_what_is_left(schedule):
    s = schedule
    seen, busy = {}, 0
    for turn in range(s.turns):
        for stage in range(s.stages):
            if 0 <= turn - stage < s.items:
                repeat, micro = s.work(turn - stage)
                seen[micro, repeat * s.stages + stage] = turn
                busy += 1
    stretches = s.stages * s.repeats
    assert set(seen) == {(micro, n) for micro in range(s.micro_batches) for n in range(stretches)}
    for (micro, n), turn in seen.items():  # what leaves a stage is what the next one reads in the next turn
        assert n == 0 or seen[micro, n - 1] == turn - 1
    assert s.bubble == pytest.approx(1 - busy / (s.turns * s.stages)) and busy == len(seen)


def _run(schedule, weights, x, rows, **options):
    kinds = kinds_of("a" * 12)

    @functools.partial(jax.jit, static_argnums=3)
    def run(w, x, rows, pipeline):
        return stack.run({"small": toy}, w, x, rows, kinds=kinds, scan=True, remat="full", pipeline=pipeline)

    return run(weights, x, rows, schedule)


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if 12 % (s.stages * s.repeats) == 0], ids=str)
def test_layers_in_stages_give_what_they_give_one_after_the_other(schedule):
    """Rows, what travels with them and sums of layers, without a mesh."""
    rng = np.random.default_rng(0)
    weights = {"small": {"w": jnp.asarray(rng.normal(size=12), jnp.float32)}}
    x, rows = (jnp.asarray(rng.normal(size=(12, 5)), jnp.float32) for _ in range(2))
    expected, sums = _run(None, weights, x, rows)
    found, others = _run(schedule, weights, x, rows)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    parts = schedule.micro_batches  # sums add over micro-batches
    np.testing.assert_array_equal(others["sums"]["index"], parts * sums["sums"]["index"])
    np.testing.assert_allclose(others["sums"]["small"], parts * sums["sums"]["small"], rtol=1e-6)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_backward_pass_computes_each_layer_again_once_and_keeps_no_weights_of_a_turn(remat):
    """Matrix products of a step in stages that never idle, counted: as many as without stages. Of what waits for the
    backward pass the matrices are counted: one of each layer, though each is cast in its turn."""
    schedule, width, layers, rows = Schedule(2, 2, 2), 8, 8, 4

    def block(w, x, rows, *, kind, index, cache):
        return jnp.tanh(x @ w["w"].astype(x.dtype)) + rows, {"cache": None, "sums": {}}

    def loss(pipeline, w, x, rows):
        kinds = kinds_of("a" * layers)
        y, _ = stack.run({"small": block}, w, x, rows, kinds=kinds, scan=True, remat=remat, pipeline=pipeline)
        return jnp.sum(y**2)

    shapes = {"small": {"w": jax.ShapeDtypeStruct((layers, width, width), jnp.float32)}}
    x = jax.ShapeDtypeStruct((rows, width), jnp.bfloat16)
    count, matrices = {}, {}
    for name, pipeline in (("plain", None), ("stages", schedule)):
        function = functools.partial(loss, pipeline)
        jaxpr = jax.make_jaxpr(jax.grad(function, argnums=(0, 1)))(shapes, x, x)
        count[name] = _rows_multiplied(jaxpr.jaxpr, 1)
        kept = jax.tree.leaves(jax.eval_shape(lambda *given, f=function: jax.vjp(f, *given)[1], shapes, x, x))
        matrices[name] = sum(math.prod(a.shape[:-2]) for a in kept if a.shape[-2:] == (width, width))
    per_pass = layers * rows
    assert count["plain"] == (3 if remat == "none" else 4) * per_pass
    turns = schedule.turns / schedule.items  # of which some do nothing
    assert count["stages"] == pytest.approx(count["plain"] * turns)
    assert matrices == {"plain": layers, "stages": layers}


def _rows_multiplied(jaxpr, times):
    """Over all matrix products of a jaxpr: products of [rows, D] and [D, D], in rows."""
    total = 0
    for eqn in jaxpr.eqns:
        inside = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        if eqn.primitive.name == "dot_general":
            sizes = [math.prod(v.aval.shape) for v in eqn.invars] + [math.prod(eqn.outvars[0].aval.shape)]
            (_, _), (batch, _) = eqn.params["dimension_numbers"]
            stages = math.prod(eqn.invars[0].aval.shape[dim] for dim in batch)
            total += inside * stages * math.isqrt(math.prod(size // stages for size in sizes)) // 64
        for sub in jaxprs_in_params(eqn.params):
            total += _rows_multiplied(sub, inside)
    return total


def test_some_rows_draw_the_dropout_that_they_have_in_the_whole_batch():
    key, x = jax.random.key(3), jnp.ones((12, 7, 5))
    numbers = np.array([1, 4, 11], np.uint32)
    part = dropout(x[numbers], 0.3, key, "here", numbers_B=jnp.asarray(numbers))
    np.testing.assert_array_equal(part, dropout(x, 0.3, key, "here")[numbers])
    assert 0.5 < float((part > 0).mean()) < 0.9


def test_places_of_more_than_32_bits():
    numbers = np.array([0, 1, 3, 255, 65535, 65536, 100_000, 2**32 - 1], np.uint32)
    for factor in (7, 100_000, 2**32 - 5):
        exact = numbers.astype(np.uint64) * np.uint64(factor)
        high, low = _times(jnp.asarray(numbers), factor)
        np.testing.assert_array_equal(high, exact >> np.uint64(32))
        np.testing.assert_array_equal(low, exact & np.uint64(0xFFFFFFFF))


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: pipelines.schedule_of(PipelineConfig(6, 2), 4), "micro_batches=6 is no multiple of the 4 stages"),
        (lambda: PipelineConfig(0, 1).check("config.mesh.pipeline"), "micro_batches=0 should be at least 1"),
        (lambda: PipelineConfig(1, 0).check("config.mesh.pipeline"), "repeats=0 should be at least 1"),
        (lambda: stack.stretch(kinds_of("a" * 10), Schedule(4, 4, 1)), "10 layers do not divide into the 4 stretches"),
        (lambda: stack.stretch(kinds_of("aabaab"), Schedule(2, 2, 3)), "stretches of 1 layers, .* are not alike"),
        (lambda: stack.stretch(kinds_of("AAaa"), Schedule(2, 2, 1)), "not alike: windows, RoPE or groups of layers"),
    ],
)
def test_what_stages_cannot_do_is_refused_in_one_line(call, message):
    with pytest.raises(UsageError, match=message):
        call()


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(UsageError, match="12 rows are not divisible by the 8 micro-batches"):
        _run(Schedule(2, 8, 1), {"small": {"w": jnp.ones(12)}}, jnp.ones((12, 5)), jnp.ones((12, 5)))


def test_layers_that_lie_elsewhere_make_no_stages():
    assert pipelines.stages_of(rules(), {"stage": 4}) == 4
    assert pipelines.stages_of(rules("layers="), {"stage": 4}) == 1
    assert pipelines.schedule_of(PipelineConfig(None, 3), 4) == Schedule(4, 4, 3)
