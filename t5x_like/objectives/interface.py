"""The contract of an objective: pure functions whose terms add up, whatever the micro-batches and the sharding.

A term is a sum over tokens, sequences or pairs. The step sums `weights` over the whole batch first and hands the
totals to `loss`, whose scalar is the sum over terms of coefficient x local sum / total. So losses and gradients of
micro-batches simply add. Statistics of a batch (whitening, advantages) are computed before the step. Micro-batches
divide the rows: what belongs together (the two texts of a pair) stands in one row.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from t5x_like.core import tree
from t5x_like.core.errors import UsageError
from t5x_like.core.types import ArraySpec, Tree
from t5x_like.models.model import Model

Batch = dict[str, jax.Array]
Sums = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, weight); the value to report is their quotient


@dataclasses.dataclass(frozen=True)
class Role:
    """A model with a part in a run: the policy that is trained, a reference, a teacher, a reward model.

    `whole(params, frozen)` is the tree that `model.apply` takes: the ONE place where the parameters of a run become
    those of a model. `params` is what is trained, `frozen` what is not, by role.
    """

    model: Model
    whole: Callable[[Tree, Mapping[str, Any]], Tree]


def policy(model: Model, attach: Callable[[Tree], Tree] = lambda whole: whole) -> Role:
    """The model that is trained; `frozen["base"]` holds those of its parameters that are not.

    attach: puts adapters, which have a root of their own in the tree of both, onto the weights.
    """
    return Role(model, lambda params, frozen: attach(tree.join(params, frozen["base"])))


def frozen_role(model: Model, name: str) -> Role:
    """A model that is only read: all its parameters are `frozen[name]`."""
    return Role(model, lambda params, frozen: frozen[name])


@dataclasses.dataclass(frozen=True)
class Objective:
    """`weights(batch)` -> {term: scalar}, which sees no parameters.

    `loss(params, frozen, batch, key, totals)` -> (scalar, sums): `params` is the trainable subtree, `frozen` holds
    what is read but not trained ({"base": subtree, ...}), no key means no dropout.
    `evaluate(params, frozen, batch)` -> sums for held-out data, with what training does not pay for (accuracy).
    `inputs`: the arrays of a batch that these functions read; batches hold them and no others.
    `judge`: which of the sums the step judges an update by: finite, and no spike.
    """

    weights: Callable[[Batch], dict[str, jax.Array]]
    loss: Callable[[Tree, dict[str, Any], Batch, jax.Array | None, dict[str, jax.Array]], tuple[jax.Array, Sums]]
    evaluate: Callable[[Tree, dict[str, Any], Batch], Sums]
    inputs: Mapping[str, ArraySpec]
    judge: str = "loss"


def inputs(
    arrays: Mapping[str, ArraySpec], needed: Sequence[str], *, optional: Sequence[str], objective: str
) -> dict[str, ArraySpec]:
    """`Objective.inputs` out of what the data offers. Raises UsageError where a needed array is missing."""
    for name in needed:
        if name not in arrays:
            raise UsageError(
                f"config.objective.name={objective!r} reads {name!r}, which this data does not have; it has "
                f"{', '.join(sorted(arrays))}"
            )
    return {name: spec for name, spec in arrays.items() if name in needed or name in optional}
