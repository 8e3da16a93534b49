"""Pipeline stages: the layers of a stack lie in parts on the mesh axis `stage`, and the parts work side by side, each
on another micro-batch.

A stack is cut into stages x repeats stretches of equal layers; stretch n lies on stage n % stages, so that with
repeats=2 a micro-batch goes round the stages twice. Every turn each stage runs one stretch on one micro-batch, and what
comes out moves on to the next stage. With 2 stages, 2 repeats and the micro-batches a, b:

    turn       0    1    2    3    4
    stage 0   a0   b0   a2   b2    -        (letter: micro-batch, number: stretch)
    stage 1    -   a1   b1   a3   b3

All stages are one `vmap` over a dim that lies on `stage`, and moving on is a `roll` along it, which becomes a
collective-permute. No shard_map: whatever a stretch does, shard_maps over all axes included, it does as without
stages. The backward pass is the loop run backward, with as many turns.

NOT here: what a layer is (layers/block.py), and how a stretch runs its layers (layers/stack.py).

Legend: S stages, R repeats, M micro-batches, B rows of the batch, b rows of a micro-batch (B = M b).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from t5x_like.core.errors import UsageError
from t5x_like.core.types import Tree
from t5x_like.parallel.rules import Rules
from t5x_like.parallel.sharding import current_rules, free_axis_sizes, nothing_to_place, use_rules

AXIS = "stage"  # of the mesh


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """How batches go through the stages of a mesh; without stages (mesh.stage=1) nothing of it is used.

    micro_batches: parts of a batch (of each part that is accumulated) that stages work on side by side, None for as
      many as there are stages. More of them leave stages idle for a smaller share of the turns.
    repeats: stretches of layers that a stage holds. More of them do so too, for more moves between stages.
    """

    micro_batches: int | None
    repeats: int

    def check(self, path: str) -> None:
        for field in ("micro_batches", "repeats"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise UsageError(f"{path}.{field}={value} should be at least 1")


NEUTRAL = PipelineConfig(micro_batches=None, repeats=1)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which stage does what in which turn.

    Stage s does item t - s in turn t. Items are ordered by groups of S micro-batches, in a group by repeats: what
    leaves the last stage is what the first needs next, so that nothing waits in between.
    """

    stages: int
    micro_batches: int
    repeats: int

    @property
    def items(self) -> int:
        """That each stage has to do."""
        return self.micro_batches * self.repeats

    @property
    def turns(self) -> int:
        return self.items + self.stages - 1

    @property
    def bubble(self) -> float:
        """The share of turns in which a stage has nothing to do, forward and backward alike.

        >>> Schedule(stages=4, micro_batches=4, repeats=1).bubble, Schedule(4, 4, 3).bubble
        (0.42857142857142855, 0.2)
        """
        return (self.stages - 1) / self.turns

    @property
    def described(self) -> str:
        """
        >>> Schedule(stages=4, micro_batches=8, repeats=1).described
        '8 micro-batches through 4 stages: 11 turns, a stage is idle in 3 of them (bubble 27.3%)'
        """
        again = f", {self.repeats} times" if self.repeats > 1 else ""
        return (
            f"{self.micro_batches} micro-batches through {self.stages} stages{again}: {self.turns} turns, a stage is "
            f"idle in {self.stages - 1} of them (bubble {self.bubble:.1%})"
        )

    def work(self, item: Any) -> tuple[Any, Any]:
        """(repeat, micro-batch) of an item, of numbers or arrays."""
        group, within = item // (self.stages * self.repeats), item % (self.stages * self.repeats)
        return within // self.stages, group * self.stages + within % self.stages

    def check(self, field: str = "config.mesh.pipeline") -> None:
        """Raises UsageError for micro-batches that would have to wait for each other."""
        if self.repeats > 1 and self.micro_batches % self.stages:
            raise UsageError(
                f"{field}.micro_batches={self.micro_batches} is no multiple of the {self.stages} stages, which "
                f"{field}.repeats={self.repeats} needs; use a multiple, or repeats=1"
            )


def schedule_of(config: PipelineConfig, stages: int) -> Schedule:
    """The schedule of a config on this many stages.

    >>> schedule_of(NEUTRAL, 4)
    Schedule(stages=4, micro_batches=4, repeats=1)
    """
    schedule = Schedule(stages, stages if config.micro_batches is None else config.micro_batches, config.repeats)
    schedule.check()
    return schedule


def stages_of(rules: Rules, sizes: Any) -> int:
    """In how many stages layers lie on a mesh with these axis sizes: 1 where the rules put them elsewhere.

    >>> from t5x_like.parallel.rules import rules
    >>> stages_of(rules(), {"stage": 4}), stages_of(rules("layers="), {"stage": 4})
    (4, 1)
    """
    return sizes.get(AXIS, 1) if AXIS in rules.mesh_axes("layers") else 1


def schedule_here(config: PipelineConfig | None) -> Schedule | None:
    """The schedule for the mesh and the rules in context, None without stages."""
    if config is None or nothing_to_place():
        return None
    stages = stages_of(current_rules(), free_axis_sizes())
    return None if stages == 1 else schedule_of(config, stages)


def on_all_stages(stack: jax.Array) -> jax.Array:
    """A stack of weights whose layers run one after the other on all devices, as in decoding: gathered from the stages
    that it lies on. The identity without stages."""
    if nothing_to_place() or stages_of(current_rules(), free_axis_sizes()) == 1:
        return stack
    rest = (PartitionSpec.UNCONSTRAINED,) * (stack.ndim - 1)
    return jax.lax.with_sharding_constraint(stack, PartitionSpec(None, *rest))


class StageFunction(Protocol):
    """One stretch of layers: (weights, x, rows, its number from 0) -> (x, outputs), a tree of sums over rows, each with
    a leading dim over the layers of the stretch."""

    def __call__(self, weights: Tree, x: jax.Array, rows: Any, number: jax.Array, /) -> tuple[jax.Array, Any]: ...


def run(
    stage_function: StageFunction,
    weights: Tree,
    x: jax.Array,
    rows: Any,
    *,
    schedule: Schedule,
    policy: Callable[..., bool] | None,
) -> tuple[jax.Array, Any]:
    """x [B, ...] after all stretches, and their outputs summed over micro-batches, in the order of the layers.

    weights: arrays [layers of a stack, ...]; rows: a tree of arrays, those with B rows are cut like x, those with one
    are for all. policy: of remat, what the backward pass finds saved of a turn; None for everything. Of the rows of a
    data shard, on all stages together, micro-batch m has every M-th from row m on: none leaves its data shard.
    """
    s, count = schedule, len(x)
    layout = _Layout(s, current_rules() if not nothing_to_place() else None)
    if count % (s.micro_batches * layout.shards):
        raise UsageError(
            f"{count} rows are not divisible by the {s.micro_batches} micro-batches of the pipeline x {layout.shards} "
            "data shards; change config.mesh.pipeline.micro_batches or the number of rows"
        )
    weights = jax.tree.map(layout.stretches, weights)
    leaves, structure = jax.tree.flatten(rows)
    cut = [a.shape[0] == count for a in leaves]
    given = [layout.on_each_stage(a) if own else a for a, own in zip(leaves, cut, strict=True)]
    stage = _stage(stage_function, s, structure, cut)
    if policy is not None:
        stage = jax.checkpoint(stage, policy=policy, prevent_cse=False)  # inside of a scan
    stage = layout.mapped(stage, in_axes=(0, 0, [0 if own else None for own in cut], 0, 0))

    def turn(carry: tuple[jax.Array, jax.Array], number: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Any]:
        arrived, held = carry  # [S, b, ...], [S, M, b, ...]
        # A stage with nothing to do takes what is there: of the batch once more, or of a result. Nobody reads what it
        # makes of that, and its gradient is 0 times finite numbers.
        items_S = (number - jnp.arange(s.stages)) % s.items
        repeats_S, micro_S = s.work(items_S)
        enters = (jnp.arange(s.stages) == 0) & (repeats_S == 0)
        entering = jax.lax.dynamic_index_in_dim(held, s.work(number % s.items)[1], axis=1, keepdims=False)
        x = jnp.where(enters.reshape(-1, *(1,) * (arrived.ndim - 1)), entering, arrived)
        x, outputs = stage(weights, x, given, repeats_S, micro_S)
        x = layout.staged(x)
        # What leaves the last stage takes the place of what entered the first. Earlier repeats are written over.
        _, leaving = s.work(jnp.maximum(number - (s.stages - 1), 0))
        held = jax.lax.dynamic_update_index_in_dim(held, x, leaving, axis=1)
        return (layout.staged(_moved_on(x)), held), outputs

    held = layout.on_each_stage(x)
    first = jax.lax.stop_gradient(held[:, 0])
    (_, held), outputs = jax.lax.scan(turn, (first, held), jnp.arange(s.turns))
    return layout.whole(held), jax.tree.map(functools.partial(_in_order, s), outputs)


def _stage(
    stage_function: StageFunction, schedule: Schedule, structure: Any, cut: Sequence[bool]
) -> Callable[..., Any]:
    """A stretch on one stage, with its weights and rows picked out of all that lie there. structure: of the rows, cut:
    which of them are those of a micro-batch."""

    def picked(stack: jax.Array, number: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(stack, number, 0, keepdims=False)

    def stage(weights: Tree, x: jax.Array, given: Any, repeat: jax.Array, micro: jax.Array, place: jax.Array) -> Any:
        if schedule.repeats > 1:
            weights = jax.tree.map(lambda a: picked(a, repeat), weights)
        else:
            weights = jax.tree.map(lambda a: a[0], weights)
        rows = structure.unflatten([picked(a, micro) if own else a for a, own in zip(given, cut, strict=True)])
        return stage_function(weights, x, rows, repeat * schedule.stages + place)

    return stage


@jax.custom_vjp
def _moved_on(x: jax.Array) -> jax.Array:
    """What each stage hands on to the next, the last one to the first. Its own gradient is one roll back; autodiff
    would take it apart into two, each a collective-permute of all."""
    return jnp.roll(x, 1, axis=0)


_moved_on.defvjp(lambda x: (_moved_on(x), None), lambda _, g: (jnp.roll(g, -1, axis=0),))


def _in_order(schedule: Schedule, outputs: jax.Array) -> jax.Array:
    """[turns, S, k, ...], of which some turns did nothing, as [layers, ...] summed over micro-batches."""
    s = schedule
    items, stages = np.arange(s.items), np.arange(s.stages)
    repeats, micro = s.work(items)
    turns = np.empty((s.repeats, s.stages, s.micro_batches), int)
    turns[repeats, :, micro] = items[:, None] + stages[None, :]
    done = outputs[turns, stages[None, :, None]].sum(axis=2)  # [R, S, k, ...]
    return done.reshape(-1, *done.shape[3:])


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How weights and rows lie on the stages. rules: in force around the pipeline; None without a mesh, where stages
    are merely a dim."""

    schedule: Schedule
    rules: Rules | None

    @property
    def _inside(self) -> Rules:
        """Of what one stage does: its rows do not lie on the axis of the stages."""
        assert self.rules is not None
        return self.rules.without(AXIS)

    def stretches(self, stack: jax.Array) -> jax.Array:
        """[layers, ...] as [S, R, layers of a stretch, ...]. With one repeat each stage has what it stores; with more,
        layers change places between stages, once a step."""
        s = self.schedule
        stack = stack.reshape(s.repeats, s.stages, -1, *stack.shape[1:])
        return self._pinned(jnp.swapaxes(stack, 0, 1), AXIS)

    @property
    def shards(self) -> int:
        """Into how many parts the rows of a micro-batch are cut."""
        return self._size(self._around[0]) * self._size(self._around[2])

    def on_each_stage(self, x: jax.Array) -> jax.Array:
        """[B, ...], whose rows lie on the stages too, as [S, M, b, ...] with all micro-batches on each stage."""
        s, (before, between, after) = self.schedule, self._around
        sizes = [self._size(axes) for axes in (before, between, after)]
        x = x.reshape(*sizes, -1, *x.shape[1:])  # the rows by where they lie
        x = self._pinned(x, before, between, after, None)
        x = self._pinned(x, before, None, after, None)
        shape = (x.shape[0], x.shape[2], -1, s.micro_batches, *x.shape[4:])
        x = jnp.moveaxis(jnp.moveaxis(x, 1, 2).reshape(shape), 3, 0)
        x = x.reshape(s.micro_batches, -1, *x.shape[4:])
        x = jnp.broadcast_to(x[None], (s.stages, *x.shape))
        return self._pinned(x, AXIS, None, *self._rows(x.shape[2]))

    def staged(self, x: jax.Array) -> jax.Array:
        """[S, b, ...], a micro-batch on each stage."""
        return self._pinned(x, AXIS, *self._rows(x.shape[1]))

    def whole(self, held: jax.Array) -> jax.Array:
        """The rows [B, ...] that the last stage holds, on all stages again."""
        s, (before, between, after) = self.schedule, self._around
        last = jnp.arange(s.stages) == s.stages - 1
        x = jnp.where(last.reshape(-1, *(1,) * (held.ndim - 1)), held, jnp.zeros((), held.dtype)).sum(axis=0)
        outer = (self._size(before), self._size(after))
        x = jnp.moveaxis(x.reshape(s.micro_batches, *outer, -1, *x.shape[2:]), 0, 3)  # [before, after, b', M, ...]
        x = jnp.moveaxis(x.reshape(*outer, self._size(between), -1, *x.shape[4:]), 2, 1)
        x = self._pinned(x, before, between, after, None)
        return self._pinned(x.reshape(-1, *x.shape[4:]), before + between + after)

    def mapped(self, stage: Callable[..., Any], *, in_axes: Any) -> Callable[..., Any]:
        """A function of one stage as one of all of them, which is told the place of each."""
        places = jnp.arange(self.schedule.stages)
        if self.rules is None:
            mapped = jax.vmap(stage, in_axes=(*in_axes, 0))
            return lambda *arguments: mapped(*arguments, places)
        mapped = jax.vmap(stage, in_axes=(*in_axes, 0), spmd_axis_name=AXIS)

        def inside(*arguments: Any) -> Any:
            with use_rules(self._inside):
                return mapped(*arguments, places)

        return inside

    @property
    def _around(self) -> tuple[tuple[str, ...], ...]:
        """The mesh axes larger than 1 that rows lie on outside of the pipeline: those before the axis of the stages,
        that one, and those behind it."""
        if self.rules is None:
            return (), (), ()
        sizes = free_axis_sizes()
        axes = [axis for axis in self.rules.mesh_axes("batch") if sizes.get(axis, 1) > 1]
        place = axes.index(AXIS) if AXIS in axes else len(axes)
        return tuple(axes[:place]), tuple(axes[place : place + 1]), tuple(axes[place + 1 :])

    @staticmethod
    def _size(axes: tuple[str, ...]) -> int:
        sizes = free_axis_sizes() if axes else {}
        return math.prod(sizes[axis] for axis in axes)

    def _rows(self, rows: int) -> PartitionSpec:
        """Where a dim of rows lies inside of the pipeline."""
        return PartitionSpec(None) if self.rules is None else self._inside.spec(("batch",), (rows,), free_axis_sizes())

    def _pinned(self, x: jax.Array, *entries: Any) -> jax.Array:
        """x with its first dims on these mesh axes; where the others lie is left to the compiler."""
        if self.rules is None:
            return x
        rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - len(entries))
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*(entry or None for entry in entries), *rest))
