"""Pairs of texts in one batch, for objectives that compare two answers to a prompt: reward models, DPO.

A row of the batch is a pair, its arrays named `chosen/...` and `rejected/...`; the arrays of an encoder, which both
share, have no side. The model sees them as rows 2i and 2i + 1 of one batch, so that each pair stays on its shard.

Names: B pairs, T length of a text.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from t5x_like.core.types import ArraySpec
from t5x_like.objectives.interface import Batch, inputs

SIDES = ("chosen", "rejected")


def needed(arrays: Mapping[str, ArraySpec], names: tuple[str, ...], *, optional: tuple[str, ...], objective: str):
    """`Objective.inputs`: these arrays of both sides and, where the data has them, the optional ones."""
    sided = [f"{side}/{name}" for side in SIDES for name in names]
    free = [*optional, *(f"{side}/{name}" for side in SIDES for name in optional)]
    return inputs(arrays, sided, optional=free, objective=objective)


def texts(batch: Batch) -> Batch:
    """The batch of 2B texts that a model reads: chosen answers at even rows, rejected ones at odd rows."""
    # In the order of the batch: that of a set is another in each process, and the processes of a run need one program.
    names = [name.partition("/")[2] for name in batch if name.startswith(SIDES[0])]
    both = {name: _interleaved([batch[f"{side}/{name}"] for side in SIDES]) for name in names}
    shared = {name: jnp.repeat(x, 2, axis=0) for name, x in batch.items() if not name.startswith(SIDES)}
    return shared | both


def sides(x_2B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(chosen, rejected), each [B], of one number a text."""
    x_B2 = x_2B.reshape(-1, 2)
    return x_B2[:, 0], x_B2[:, 1]


def _interleaved(arrays: list[jax.Array]) -> jax.Array:
    stacked = jnp.stack(arrays, axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])
