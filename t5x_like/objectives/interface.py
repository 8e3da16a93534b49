"""The contract of an objective: pure functions whose terms add up, whatever the micro-batches and the sharding.

A term is a sum over tokens, sequences or pairs. The step sums `weights` over the whole batch first and hands the
totals to `loss`, whose scalar is the sum over terms of coefficient x local sum / total. So losses and gradients of
micro-batches simply add. Statistics of a batch (whitening, advantages) are computed before the step. Micro-batches
divide the rows: what belongs together (the two texts of a pair) stands in one row.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from t5x_like.core.types import Tree

Batch = dict[str, jax.Array]
Sums = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, weight); the value to report is their quotient


@dataclasses.dataclass(frozen=True)
class Objective:
    """`weights(batch)` -> {term: scalar}, which sees no parameters.

    `loss(params, frozen, batch, key, totals)` -> (scalar, sums): `params` is the trainable subtree, `frozen` holds
    what is read but not trained ({"base": subtree, ...}), no key means no dropout. `sums` holds "loss", by which the
    step judges whether an update is finite and no spike.
    `evaluate(params, frozen, batch)` -> sums for held-out data, with what training does not pay for (accuracy).
    """

    weights: Callable[[Batch], dict[str, jax.Array]]
    loss: Callable[[Tree, dict[str, Any], Batch, jax.Array | None, dict[str, jax.Array]], tuple[jax.Array, Sums]]
    evaluate: Callable[[Tree, dict[str, Any], Batch], Sums]
