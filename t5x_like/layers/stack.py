"""Runs layers of equal shapes that are stored as one array per weight: scanned or unrolled, with remat. The ONE file.

Stored by kind, run by pattern: weights are [L, ...] in layer order, whatever happens here. Static differences between
layers (window, RoPE base) are a tuple of one value a layer; its period p decides the shape of the scan, [L/p, p], and
layers that are left over run after it. A block is any function of one layer's weights; this file knows no mathematics.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from t5x_like.core.types import Tree

# Names that blocks give to activations with `checkpoint_name`.
_PROJECTIONS = ("q", "k", "v", "context", "mlp_gate", "mlp_up")
_policies = jax.checkpoint_policies

# What the backward pass finds saved; everything else inside a layer is computed again. Least memory last.
REMAT: dict[str, Callable[..., bool]] = {
    "none": _policies.everything_saveable,  # but for what a layer itself leaves out (mlp.py: its activation)
    "dots": _policies.dots_saveable,
    "minimal": _policies.save_only_these_names(*_PROJECTIONS),  # computes norms, activations and attention again
    "context": _policies.save_only_these_names("context"),  # saves attention's output: its kernel runs once
    "full": _policies.nothing_saveable,  # one [B, T, D] a layer
}


class BlockFunction(Protocol):
    """(weights, x) -> (x, outputs) for one layer. place: its static place in the period, which tells its kind; index:
    its number; cache: its slice of what is read."""

    def __call__(
        self, weights: Tree, x: jax.Array, /, *, place: int, index: int | jax.Array, cache: Tree | None
    ) -> tuple[jax.Array, Any]: ...


def period(kinds: Sequence[Hashable]) -> int:
    """The smallest p with kinds[i] == kinds[i % p].

    >>> period(("local", "local", "global", "local", "local", "global", "local"))
    3
    """
    return next(p for p in range(1, len(kinds) + 1) if all(kind == kinds[i % p] for i, kind in enumerate(kinds)))


def run(
    block: BlockFunction,
    weights: Tree,
    x: jax.Array,
    *,
    kinds: Sequence[Hashable],
    caches: Sequence[Tree] | None,
    scan: bool,
    remat: str,
) -> tuple[jax.Array, Any]:
    """x after all layers, and the blocks' outputs stacked in layer order.

    weights: arrays [L, ...]. caches: one tree a place in the period, arrays [layers at that place, ...], only read.
    scan=False gives the same result from a longer program, which saves the copies in and out of stacked arrays.
    """
    p = period(kinds)
    repeats = len(kinds) // p if scan else 0
    if repeats == 1:
        repeats = 0  # nothing to repeat
    plain_scan = repeats > 0 and p == 1
    steps = [_with_remat(functools.partial(block, place=place), remat, plain_scan=plain_scan) for place in range(p)]
    scanned = repeats * p
    first, rest = _cut(weights, scanned, len(kinds))
    outputs = []
    if scanned:
        xs = (
            jax.tree.map(lambda a: a.reshape(repeats, p, *a.shape[1:]), first) if p > 1 else first,
            None if caches is None else [jax.tree.map(lambda a: a[:repeats], cache) for cache in caches],
            jnp.arange(scanned).reshape(repeats, p),
        )
        x, stacked = jax.lax.scan(functools.partial(_body, steps), x, xs)
        outputs.append(jax.tree.map(lambda a: a.reshape(scanned, *a.shape[2:]), stacked) if p > 1 else stacked)
    for number, layer in enumerate(_layers(rest, len(kinds) - scanned)):
        index = scanned + number
        cache = None if caches is None else jax.tree.map(lambda a, row=index // p: a[row], caches[index % p])
        x, output = steps[index % p](layer, x, index=index, cache=cache)
        outputs.append(jax.tree.map(lambda a: a[None], output))
    return x, outputs[0] if len(outputs) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)


def _body(steps: Sequence[Callable[..., Any]], x: jax.Array, slices: Any) -> tuple[jax.Array, Any]:
    """One period of layers."""
    weights, caches, indices = slices
    layers = [weights] if len(steps) == 1 else _layers(weights, len(steps))
    outputs = []
    for place, step in enumerate(steps):
        cache = None if caches is None else caches[place]
        x, output = step(layers[place], x, index=indices[place], cache=cache)
        outputs.append(output)
    return x, outputs[0] if len(steps) == 1 else jax.tree.map(lambda *parts: jnp.stack(parts), *outputs)


def _with_remat(step: Callable[..., Any], remat: str, *, plain_scan: bool) -> Callable[..., Any]:
    if remat == "none":
        return step
    # The body of a scan over single layers is differentiated on its own, so there is nothing to share by mistake.
    # With several layers side by side, common subexpressions would undo the remat.
    return jax.checkpoint(step, policy=REMAT[remat], prevent_cse=not plain_scan)


def _cut(weights: Tree, at: int, length: int) -> tuple[Tree, Tree]:
    """Layers before and after `at`. By `split`, whose gradient is one concatenation; that of slicing is a sum of padded
    arrays of full size."""
    if at in (0, length):
        return weights, weights
    pairs = jax.tree.map(lambda a: jax.lax.split(a, (at, length - at)), weights)
    before, after = (jax.tree.map(lambda _, pair, i=i: pair[i], weights, pairs) for i in (0, 1))
    return before, after


def _layers(weights: Tree, count: int) -> list[Any]:
    """One tree for each of the first `count` layers."""
    if count == 0:
        return []
    parts = jax.tree.map(lambda a: [part[0] for part in jax.lax.split(a, (1,) * count)], weights)
    return [jax.tree.map(lambda _, part, i=i: part[i], weights, parts) for i in range(count)]
