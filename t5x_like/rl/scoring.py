"""Log-probabilities of answers under the policy as it is, and under the reference: before the updates that read them.

The forward is that of training, on batches and micro-batches of the same shape.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from t5x_like.core.types import ArraySpec
from t5x_like.objectives.grpo import GrpoConfig, score
from t5x_like.objectives.interface import Batch, Role
from t5x_like.parallel.rules import Rules
from t5x_like.parallel.sharding import constrain, use_rules

# What a model reads of a batch, and the tokens that are scored.
TOKENS = (
    *("inputs", "targets", "segment_ids", "encoder_inputs", "encoder_segment_ids"),
    *("branches", "positions"),  # where answers share their prompt
)


def scoring_function(
    role: Role, config: GrpoConfig, *, rules: Rules, inputs: Mapping[str, ArraySpec], micro_batches: int
) -> Callable[[Any, Any, Batch], jax.Array]:
    """`(params, frozen, batch) -> logp [rows, targets of a row]`, pure and ready for jit; the batch holds TOKENS."""

    def part(params, frozen, batch: Batch) -> jax.Array:
        logp = score(role, params, frozen, batch, want=("logp",), config=config).logp
        return logp.reshape(len(batch["inputs"]), -1)

    def whole(params, frozen, batch: Batch) -> jax.Array:
        with use_rules(rules):
            if micro_batches == 1:
                return part(params, frozen, batch)

            def divide(name: str, x: jax.Array) -> jax.Array:
                x = jnp.swapaxes(x.reshape(x.shape[0] // micro_batches, micro_batches, *x.shape[1:]), 0, 1)
                return constrain(x, None, *inputs[name].axes)

            divided = {name: divide(name, x) for name, x in batch.items()}
            logp_mbT = jax.lax.map(lambda micro: part(params, frozen, micro), divided)
            return jnp.swapaxes(logp_mbT, 0, 1).reshape(-1, logp_mbT.shape[-1])

    return whole
