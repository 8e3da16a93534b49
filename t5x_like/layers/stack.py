"""Runs the layers of a model, which are stored as one array per weight: scanned or unrolled, with remat. The ONE file.

Stored by kind, run by pattern. Layers of equal shapes are a group, [layers of the group, ...] in layer order, whatever
happens here; unlike layers (dense, experts) are several groups. Static differences between layers (group, window, RoPE
base) are a tuple of one kind a layer. Its segments decide the program: each periodic stretch is one scan, and what does
not repeat is written out. A block is any function of one layer's weights; this file knows no mathematics.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from t5x_like.core.errors import UsageError
from t5x_like.core.types import Tree
from t5x_like.layers import remat as remats
from t5x_like.parallel import pipeline as pipelines
from t5x_like.parallel.pipeline import Schedule, on_all_stages

# What a layer reads, which is kept of a turn of a pipeline whatever is computed again. No other policy knows the name.
_LAYER_INPUT = "layer_input"
# Primitives that pick, cast and reshape. What they make of weights is made again, where repeats pick other ones in each
# turn: `remat="none"` would keep a copy of a stretch for every turn.
_MOVES = (
    "dynamic_slice",
    "gather",
    "slice",
    "squeeze",
    "convert_element_type",
    "reshape",
    "transpose",
    "broadcast_in_dim",
)


class Kind(Protocol):
    """What is static of one layer: hashable, and with the name of the group that stores its weights."""

    @property
    def group(self) -> str: ...


class BlockFunction(Protocol):
    """One layer: (weights, x, rows) -> (x, {"cache": its part of a cache or None, "sums": {name: array}}).

    rows: values of each row that go along with x. kind: static. index: the layer's number. cache: all layers' cache,
    closed over and read by index; None without one.
    """

    def __call__(
        self, weights: Tree, x: jax.Array, rows: Any, /, *, kind: Any, index: int | jax.Array, cache: Any
    ) -> tuple[jax.Array, dict[str, Any]]: ...


@dataclasses.dataclass(frozen=True)
class Segment:
    """`repeats` times a stretch of `period` layers, from layer `start` on; once: layers that do not repeat."""

    start: int
    period: int
    repeats: int

    @property
    def layers(self) -> int:
        return self.period * self.repeats


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Apart:
    """A weight of a group as one array a layer, for layers that run one by one inside of a loop over tokens: XLA's CPU
    compiler would cut each out of its stack, a copy, again for every token."""

    layers: tuple[jax.Array, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stack."""
        return (len(self.layers), *self.layers[0].shape)

    def split(self, sizes: Sequence[int]) -> list[jax.Array]:
        """As stacks of one layer."""
        assert set(sizes) == {1}, "layers that are apart run one by one"
        return [layer[None] for layer in self.layers]


def apart(weights: Tree) -> Tree:
    """The stacks of a group as `Apart`: a copy of its weights."""
    return jax.tree.map(lambda a: Apart(tuple(a[number] for number in range(a.shape[0]))), weights)


def over_layers(function: Callable[[Tree], Any], weights: Tree) -> Any:
    """What a function gives for each layer of a group, stacked."""
    if not any(map(_is_apart, jax.tree.leaves(weights, is_leaf=_is_apart))):
        return jax.lax.map(function, weights)
    layers = len(jax.tree.leaves(weights, is_leaf=_is_apart)[0].layers)
    each = [function(jax.tree.map(lambda a, n=n: _at(a, n), weights, is_leaf=_is_apart)) for n in range(layers)]
    return jax.tree.map(lambda *parts: jnp.stack(parts), *each)


def _is_apart(leaf: Any) -> bool:
    return isinstance(leaf, Apart)


def _at(weight: Any, layer: int | jax.Array) -> jax.Array:
    if _is_apart(weight):
        assert isinstance(layer, int), "layers that are apart do not run scanned"
        return weight.layers[layer]
    return jax.lax.dynamic_index_in_dim(weight, layer, 0, keepdims=False)


def segments(kinds: Sequence[Any]) -> tuple[Segment, ...]:
    """The segments of a stack: the periodic stretch that leaves the fewest layers to write out, then those around it.

    >>> segments("ddeeee")
    (Segment(start=0, period=1, repeats=2), Segment(start=2, period=1, repeats=4))
    >>> segments("llgllgl")
    (Segment(start=0, period=3, repeats=2), Segment(start=6, period=1, repeats=1))
    """
    if not kinds:
        return ()
    candidates = []
    for period in range(1, len(kinds) // 2 + 1):
        equal = 0  # layers from `start` on that are like the one a period later
        for start in reversed(range(len(kinds) - period)):
            equal = equal + 1 if kinds[start] == kinds[start + period] else 0
            if equal >= period:
                repeats = equal // period + 1
                candidates.append((len(kinds) - (repeats - 1) * period, start, period, repeats))
    if not candidates:
        return (Segment(0, len(kinds), 1),)
    middle = Segment(*min(candidates)[1:])
    end = middle.start + middle.layers
    after = (dataclasses.replace(segment, start=segment.start + end) for segment in segments(kinds[end:]))
    return (*segments(kinds[: middle.start]), middle, *after)


def run(
    blocks: Mapping[str, BlockFunction],
    weights: Mapping[str, Tree],
    x: jax.Array,
    rows: Any,
    *,
    kinds: Sequence[Kind],
    cache: Any = None,
    scan: bool,
    remat: str,
    pipeline: Schedule | None = None,
    first: int | jax.Array = 0,
) -> tuple[jax.Array, dict[str, Any]]:
    """x after all layers, and {"cache", "sums"} of the blocks, each stacked in the order of the layers that give it.

    blocks, weights: by group; arrays [layers of the group, ...]. rows: a tree of per-row values handed to every block
    beside x. scan=False gives the same result from a longer program, which saves the copies in and out of stacked
    arrays. remat: in the words of remat.py. With a cache no gradient is taken, and neither weights nor cache are cut
    into segments, which would copy them: each layer is picked by its number out of the whole, and pipeline stages are
    not used. first: the number of the first of these layers.
    """
    if pipeline is not None and cache is None:
        return _in_stages(blocks, weights, x, rows, kinds=kinds, scan=scan, remat=remat, schedule=pipeline)
    weights = jax.tree.map(lambda a: a if _is_apart(a) else on_all_stages(a), weights, is_leaf=_is_apart)
    saved = ("none",) * len(kinds) if cache is not None else remats.by_layer(remat, kinds)
    plan = segments(list(zip(kinds, saved, strict=True))) if scan else (Segment(0, len(kinds), 1),)
    if cache is None:
        parts = _cut(weights, kinds, plan)
    outputs = []
    for number, segment in enumerate(plan):
        steps = _steps(blocks, kinds, saved, segment, cache=cache)
        if cache is None:
            pick, xs = _given(kinds, segment), parts[number]
        else:
            pick, xs = _picked(weights, kinds, segment), None
        body = functools.partial(_body, steps, pick, rows, segment, first)
        if segment.repeats == 1:
            x, output = body(x, (0, xs))
        else:
            x, stacked = jax.lax.scan(body, x, (jnp.arange(segment.repeats), xs))
            output = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), stacked)
        outputs.append(output)
    return x, outputs[0] if len(outputs) == 1 else _joined(outputs, jnp.concatenate)


def stretch(kinds: Sequence[Kind], schedule: Schedule) -> Sequence[Kind]:
    """The kinds of the layers of one stretch of a pipeline; all stretches have the same, since all stages run one
    program. Raises UsageError for layers that cannot be cut so."""
    count, parts = len(kinds), schedule.stages * schedule.repeats
    said = f"config.mesh.stage={schedule.stages} x config.mesh.pipeline.repeats={schedule.repeats}"
    if count % parts:
        raise UsageError(f"{count} layers do not divide into the {parts} stretches of {said}; change one of them")
    length = count // parts
    if any(kind != kinds[number % length] for number, kind in enumerate(kinds)):
        raise UsageError(
            f"stretches of {length} layers, which {said} makes of {count}, are not alike: windows, RoPE or groups of "
            "layers have another period; use fewer stages or repeats"
        )
    return kinds[:length]


def _in_stages(
    blocks: Mapping[str, BlockFunction],
    weights: Mapping[str, Tree],
    x: jax.Array,
    rows: Any,
    *,
    kinds: Sequence[Kind],
    scan: bool,
    remat: str,
    schedule: Schedule,
) -> tuple[jax.Array, dict[str, Any]]:
    """As `run`, with the layers on the stages of a pipeline. Sums add over its micro-batches."""
    alike = stretch(kinds, schedule)

    def stage(weights: Tree, x: jax.Array, rows: Any, number: jax.Array) -> tuple[jax.Array, Any]:
        first = number * len(alike)
        return run(blocks, weights, x, rows, kinds=alike, scan=scan, remat=remat, first=first)

    policies = [remats.policy(name) for name in sorted(set(remats.by_layer(remat, alike)))]
    # The weights of a stretch are picked again, not kept of every turn. What a layer reads is kept, so that the
    # backward pass computes each layer again by itself, once.
    both = jax.checkpoint_policies.save_from_both_policies
    policy = jax.checkpoint_policies.save_only_these_names(_LAYER_INPUT)
    for each in policies:
        policy = None if policy is None or each is None else both(each, policy)
    if policy is None and schedule.repeats > 1:
        policy = _all_but_moves
    return pipelines.run(stage, weights, x, rows, schedule=schedule, policy=policy)


def _all_but_moves(primitive: Any, *_: Any, **__: Any) -> bool:
    """For `jax.checkpoint`: saves what is computed."""
    return primitive.name not in _MOVES


def _steps(
    blocks: Mapping[str, BlockFunction], kinds: Sequence[Kind], saved: Sequence[str], segment: Segment, *, cache: Any
) -> list[Callable[..., Any]]:
    """The function of each layer of a period."""
    # The body of a scan over single layers is differentiated on its own, so there is nothing to share by mistake.
    # With several layers side by side, common subexpressions would undo the remat.
    plain_scan = segment.period == 1 and segment.repeats > 1
    steps = []
    for number in range(segment.start, segment.start + segment.period):
        kind, policy = kinds[number], remats.policy(saved[number])
        step = functools.partial(blocks[kind.group], kind=kind, cache=cache)
        again = functools.partial(jax.checkpoint, policy=policy, prevent_cse=not plain_scan)
        steps.append(step if policy is None else again(step))
    return steps


def _body(
    steps, pick, rows: Any, segment: Segment, first: int | jax.Array, x: jax.Array, slices: Any
) -> tuple[jax.Array, Any]:
    """One period of layers; its outputs have a leading dim over its layers."""
    repeat, given = slices
    layers = pick(repeat, given)
    outputs = []
    for place, (step, layer) in enumerate(zip(steps, layers, strict=True)):
        x = checkpoint_name(x, _LAYER_INPUT)
        x, output = step(layer, x, rows, index=first + segment.start + repeat * segment.period + place)
        outputs.append(jax.tree.map(lambda a: a[None], output))
    return x, outputs[0] if len(outputs) == 1 else _joined(outputs, jnp.concatenate)


def _joined(outputs: Sequence[dict[str, Any]], join: Callable[..., Any]) -> dict[str, Any]:
    """Outputs of several layers as one; a sum that some layers do not give is made of the others'."""
    names = dict.fromkeys(name for output in outputs for name in output["sums"])
    return {
        "cache": jax.tree.map(lambda *parts: join(parts), *(output["cache"] for output in outputs)),
        "sums": {name: join([o["sums"][name] for o in outputs if name in o["sums"]]) for name in names},
    }


# The weights of a period's layers. Without a cache they are cut out of the stacks: a scan then adds up no gradient of a
# whole stack. By `split`, whose gradient is one concatenation; that of slicing is a sum of padded arrays of full size.


def _cut(weights: Mapping[str, Tree], kinds: Sequence[Kind], plan: Sequence[Segment]) -> list[dict[str, Tree]]:
    """The weights of each segment, by group: [repeats, layers of the group in a period, ...]."""
    parts: list[dict[str, Tree]] = [{} for _ in plan]
    for group, stack in weights.items():
        counts = [_of_group(kinds[s.start : s.start + s.layers], group) for s in plan]
        numbers = [number for number, count in enumerate(counts) if count]
        for number, part in zip(numbers, _split(stack, [counts[number] for number in numbers]), strict=True):
            repeats = plan[number].repeats
            if repeats > 1 and counts[number] > repeats:
                part = jax.tree.map(lambda a, r=repeats: a.reshape(r, -1, *a.shape[1:]), part)
            parts[number][group] = part
    return parts


def _given(kinds: Sequence[Kind], segment: Segment) -> Callable[..., list[Tree]]:
    period = kinds[segment.start : segment.start + segment.period]

    def pick(repeat: Any, part: Mapping[str, Tree]) -> list[Tree]:
        layers = {}
        for group, stack in part.items():
            count = _of_group(period, group)
            alone = count == 1 and segment.repeats > 1
            layers[group] = iter([stack] if alone else map(_first, _split(stack, [1] * count)))
        return [next(layers[kind.group]) for kind in period]

    return pick


def _picked(weights: Mapping[str, Tree], kinds: Sequence[Kind], segment: Segment) -> Callable[..., list[Tree]]:
    before = collections.Counter(kind.group for kind in kinds[: segment.start])
    period = kinds[segment.start : segment.start + segment.period]
    strides = collections.Counter(kind.group for kind in period)

    def pick(repeat: Any, part: None) -> list[Tree]:
        seen: collections.Counter[str] = collections.Counter()
        layers = []
        for kind in period:
            number = before[kind.group] + repeat * strides[kind.group] + seen[kind.group]
            layers.append(jax.tree.map(lambda a, n=number: _at(a, n), weights[kind.group], is_leaf=_is_apart))
            seen[kind.group] += 1
        return layers

    return pick


def _of_group(kinds: Sequence[Kind], group: str) -> int:
    return sum(kind.group == group for kind in kinds)


def _split(stack: Tree, sizes: Sequence[int]) -> list[Tree]:
    """A stack of layers in parts of these sizes."""
    if len(sizes) == 1:
        return [stack]
    leaves, structure = jax.tree.flatten(stack, is_leaf=_is_apart)
    pieces = [a.split(sizes) if isinstance(a, Apart) else jax.lax.split(a, tuple(sizes)) for a in leaves]
    return [structure.unflatten(parts) for parts in zip(*pieces, strict=True)]


def _first(stack: Tree) -> Tree:
    return jax.tree.map(lambda a: a.layers[0] if _is_apart(a) else a[0], stack, is_leaf=_is_apart)
