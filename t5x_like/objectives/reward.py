"""A reward model: one number a text, learned from pairs of answers (Bradley-Terry; arXiv 1706.03741, equation 1).

    loss = -log sigmoid(r_chosen - r_rejected) + centering * (r_chosen + r_rejected)^2

The reward is read by the head `reward` at the last token of the text, its end token where it was not cut off. The
second term keeps rewards around 0, which differences alone leave open (arXiv 2312.09244, equation 2). Only pairs of
which both texts have tokens count.

Names: B pairs, T length of a text.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from t5x_like.core.errors import UsageError
from t5x_like.core.types import ArraySpec
from t5x_like.objectives import pairs
from t5x_like.objectives.interface import Batch, Objective, Role, Sums

HEAD = "reward"


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """`centering`: coefficient of the squared sum of both rewards, 0 for none."""

    centering: float

    def check(self, path: str) -> None:
        if not 0 <= self.centering < float("inf"):
            raise UsageError(f"{path}.centering={self.centering:g} should be a number from 0")


def build(config: RewardConfig, roles: Mapping[str, Role], arrays: Mapping[str, ArraySpec]) -> Objective:
    policy = roles["policy"]
    if HEAD not in policy.model.config.scalar_heads:
        raise UsageError(f"config.objective.name='reward' trains a head; set config.model.scalar_heads=({HEAD!r},)")

    def real(batch: Batch) -> jax.Array:
        """1 for each pair of which both texts have tokens."""
        counts = [jnp.sum(batch[f"{side}/segment_ids"] > 0, axis=1) for side in pairs.SIDES]
        return ((counts[0] > 0) & (counts[1] > 0)).astype(jnp.float32)

    def weights(batch: Batch) -> dict[str, jax.Array]:
        return {"pairs": jnp.sum(real(batch))}

    def compare(params, frozen, batch: Batch, key) -> tuple[jax.Array, Sums]:
        """(sum of losses, what is reported)."""
        chosen_B, rejected_B = pairs.sides(rewards(policy, params, frozen, pairs.texts(batch), key=key))
        real_B = real(batch)
        count = jnp.sum(real_B)
        margin_B = chosen_B - rejected_B
        compared = jnp.sum(real_B * -jax.nn.log_sigmoid(margin_B))
        total = compared + config.centering * jnp.sum(real_B * jnp.square(chosen_B + rejected_B))
        reported = {
            "loss": compared,
            "accuracy": jnp.sum(real_B * (margin_B > 0)),
            "margin": jnp.sum(real_B * margin_B),
            "reward_chosen": jnp.sum(real_B * chosen_B),
            "reward_rejected": jnp.sum(real_B * rejected_B),
        }
        return total, {name: (value, count) for name, value in reported.items()}

    def loss(params, frozen, batch: Batch, key, totals) -> tuple[jax.Array, Sums]:
        total, sums = compare(params, frozen, batch, key)
        return total / totals["pairs"], sums

    def evaluate(params, frozen, batch: Batch) -> Sums:
        return compare(params, frozen, batch, None)[1]

    read = pairs.needed(arrays, ("inputs", "segment_ids"), optional=policy.model.inputs, objective="reward")
    return Objective(weights, loss, evaluate, read)


def rewards(role: Role, params, frozen, batch: Batch, *, key) -> jax.Array:
    """The reward of each text, float32: the head's number at the last token whose segment is not 0."""
    parameters = role.whole(params, frozen)
    output = role.model.apply(parameters, batch, key=key)
    each_BT = role.model.read(parameters, output, HEAD)
    last_B = jnp.maximum(jnp.sum(batch["segment_ids"] > 0, axis=1) - 1, 0)
    return jnp.take_along_axis(each_BT, last_B[:, None], axis=1)[:, 0]
