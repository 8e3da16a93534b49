"""Group relative policy optimisation (GRPO, arXiv 2402.03300): a clipped policy gradient on answers of the policy.

    l = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + kl_coefficient k3,   rho = exp(logp - old_logp)

for each token of an answer, where k3 = exp(d) - d - 1 with d = reference_logp - logp estimates the KL divergence from
the policy to the reference. Answers and advantages are made before the step (t5x_like/rl), and are arrays of the batch.
Three aggregations by name, all sums over totals of the whole batch:

    token      sum of l over all tokens / number of tokens (arXiv 2503.14476, DAPO)
    sequence   mean over answers of the mean of l over their tokens (the paper's)
    constant   sum of l / (number of answers x `constant` tokens) (arXiv 2503.20783, Dr. GRPO)

The temperature of the rollouts divides the logits here too. The first update after a rollout is `on_policy`: its own
log-probabilities are the old ones, so that rho is 1 whatever the compiler fuses.

A row of a batch is an answer behind its prompt or, where the batch has `branches`, a prompt with several answers; what
belongs to answers then has a dim for them (`by_answer`).

Names: B batch (answers), T query length or, of answers that share a prompt, tokens of an answer, R rows, J answers of a
row, D model.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError
from t5x_like.core.types import ArraySpec
from t5x_like.layers.scoring.token_scores import token_scores
from t5x_like.objectives.interface import Batch, Objective, Role, Sums, inputs
from t5x_like.parallel.sharding import constrain, use_rules

AGGREGATIONS = ("token", "sequence", "constant")
# "role" is the model config.roles.reference, "base" the policy without its adapters. Either is scored before the
# updates, which read its log-probabilities as an array of the batch.
REFERENCES = ("none", "role", "base")
OF_ANSWERS = ("targets", "loss_weights", "advantages", "on_policy", "old_logp", "rollout_logp", "reference_logp")
READ = ("inputs", *OF_ANSWERS[:-1])


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
    """clip_low, clip_high: how far a ratio counts below and above 1. kl_coefficient: of k3 to the reference.
    reference: REFERENCES. aggregation: AGGREGATIONS; constant: tokens, for the one of that name, else 0. temperature:
    of rollouts, and of all log-probabilities."""

    clip_low: float
    clip_high: float
    kl_coefficient: float
    reference: str
    aggregation: str
    constant: int
    temperature: float

    @property
    def roles(self) -> tuple[str, ...]:
        """The models that are read besides the policy."""
        return ("reference",) if self.reference == "role" else ()

    def check(self, path: str) -> None:
        if not 0 < self.clip_low <= 1:
            raise UsageError(f"{path}.clip_low={self.clip_low:g} should be above 0 and at most 1")
        if not self.clip_high > 0:
            raise UsageError(f"{path}.clip_high={self.clip_high:g} should be above 0")
        if self.kl_coefficient < 0:
            raise UsageError(f"{path}.kl_coefficient={self.kl_coefficient:g} should not be negative")
        if self.reference not in REFERENCES:
            raise UsageError(f"{path}.reference={self.reference!r} is unknown; {nearest(self.reference, REFERENCES)}")
        if (self.reference == "none") != (self.kl_coefficient == 0):
            raise UsageError(
                f"{path}.kl_coefficient={self.kl_coefficient:g} and reference={self.reference!r} do not fit: a "
                "divergence needs a reference, 'role' or 'base', and none is read at a coefficient of 0"
            )
        if self.aggregation not in AGGREGATIONS:
            raise UsageError(
                f"{path}.aggregation={self.aggregation!r} is unknown; {nearest(self.aggregation, AGGREGATIONS)}"
            )
        if (self.aggregation == "constant") != (self.constant > 0):
            raise UsageError(
                f"{path}.constant={self.constant} should be the tokens (1 or more) that aggregation='constant' divides "
                f"by, and 0 with any other; aggregation is {self.aggregation!r}"
            )
        if not self.temperature > 0:
            raise UsageError(f"{path}.temperature={self.temperature:g} should be above 0: greedy answers are all equal")


def build(config: GrpoConfig, roles: Mapping[str, Role], arrays: Mapping[str, ArraySpec]) -> Objective:
    policy = roles["policy"]

    def weights(batch: Batch) -> dict[str, jax.Array]:
        return {"answers": total(config, by_answer(batch)["loss_weights"])}

    def loss(params, frozen, batch: Batch, key, totals) -> tuple[jax.Array, Sums]:
        scores = score(policy, params, frozen, batch, want=("logp", "entropy"), config=config, key=key)
        answers = by_answer(batch)
        value, sums = terms(config, scores.logp, answers)
        weights_BT = answers["loss_weights"]
        sums["entropy_token_mean"] = (jnp.sum(weights_BT * scores.entropy), jnp.sum(weights_BT))
        return value / totals["answers"], sums

    def evaluate(params, frozen, batch: Batch) -> Sums:
        scores = score(policy, params, frozen, batch, want=("logp",), config=config)
        return terms(config, scores.logp, by_answer(batch))[1]

    needed = (*READ, "reference_logp") if config.kl_coefficient else READ
    read = inputs(arrays, needed, optional=policy.model.inputs, objective="grpo")
    return Objective(weights, loss, evaluate, read)


def score(role: Role, params, frozen, batch: Batch, *, want: tuple[str, ...], config: GrpoConfig, key=None):
    """Scores of the targets of a batch under a model of the run, one row an answer, at the temperature of the
    rollouts."""
    parameters = role.whole(params, frozen)
    hidden_BTD, head = role.model.score_input(parameters, role.model.apply(parameters, batch, key=key))
    if "branches" in batch:
        with use_rules(role.model.rules):
            hidden_BTD = _before_answers(hidden_BTD, room=batch["inputs"].shape[1], answers=batch["branches"].shape[1])
    temperature = None if config.temperature == 1 else config.temperature
    return token_scores(hidden_BTD, head, by_answer(batch)["targets"], want=want, temperature=temperature)


def by_answer(batch: Batch) -> Batch:
    """OF_ANSWERS with one row an answer."""
    found = {name: batch[name] for name in OF_ANSWERS if name in batch}
    if "branches" not in batch:
        return found
    return {name: x.reshape(-1, *x.shape[2:]) for name, x in found.items()}


def _before_answers(hidden_RTD: Float[Array, "R T D"], *, room: int, answers: int) -> Float[Array, "B N D"]:
    """What stands before each token of each answer: the prompt's last token, then the answer's own."""
    rows, _, width = hidden_RTD.shape
    behind_RJTD = hidden_RTD[:, room:].reshape(rows, answers, -1, width)
    last_RJ1D = jnp.broadcast_to(hidden_RTD[:, None, room - 1 : room], (rows, answers, 1, width))
    before_BND = jnp.concatenate([last_RJ1D, behind_RJTD], axis=2).reshape(rows * answers, -1, width)
    return constrain(before_BND, "batch", "length", None)


def total(config: GrpoConfig, weights_BT: Float[Array, "B T"]) -> Float[Array, ""]:
    """What the sum of the loss over all answers is divided by."""
    if config.aggregation == "token":
        return jnp.sum(weights_BT)
    answers = jnp.sum(jnp.any(weights_BT > 0, axis=1).astype(jnp.float32))
    return answers * config.constant if config.aggregation == "constant" else answers


def terms(config: GrpoConfig, logp_BT: Float[Array, "B T"], batch: Batch) -> tuple[Float[Array, ""], Sums]:
    """(sum of the loss, to be divided by `total`; what is reported) from log-probabilities of the answers' tokens.

    Rows without weight (answers that are left out) count nowhere.
    """
    weights_BT, advantages_B1 = batch["loss_weights"], batch["advantages"][:, None]
    inside_BT = weights_BT > 0
    old_BT = jnp.where(batch["on_policy"][:, None] > 0, jax.lax.stop_gradient(logp_BT), batch["old_logp"])
    # What is no answer has numbers too, whose exponential may be infinite.
    change_BT = jnp.where(inside_BT, logp_BT - old_BT, 0.0)
    ratio_BT = jnp.exp(change_BT)
    clipped_BT = jnp.clip(ratio_BT, 1 - config.clip_low, 1 + config.clip_high)
    loss_BT = -jnp.minimum(ratio_BT * advantages_B1, clipped_BT * advantages_B1)
    low_BT = (ratio_BT < 1 - config.clip_low) & (advantages_B1 < 0)
    high_BT = (ratio_BT > 1 + config.clip_high) & (advantages_B1 > 0)
    reported = {
        "ratio_token_mean": ratio_BT,
        "clipped_low_fraction": low_BT,
        "clipped_high_fraction": high_BT,
        "update_kl_token_mean": _k3(-change_BT),
        # Between what the sampler said of its tokens and what training says with the same parameters.
        "rollout_gap_token_mean": jnp.where(inside_BT, jnp.abs(old_BT - batch["rollout_logp"]), 0.0),
    }
    if config.kl_coefficient:
        kl_BT = _k3(jnp.where(inside_BT, batch["reference_logp"] - logp_BT, 0.0))
        loss_BT = loss_BT + config.kl_coefficient * kl_BT
        reported["kl_token_mean"] = kl_BT
    count = jnp.sum(weights_BT)
    sums = {name: (jnp.sum(weights_BT * values_BT), count) for name, values_BT in reported.items()}
    summed_B = jnp.sum(weights_BT * loss_BT, axis=1)
    if config.aggregation == "sequence":
        summed_B = summed_B / jnp.maximum(jnp.sum(weights_BT, axis=1), 1.0)
    value = jnp.sum(summed_B)
    return value, {"loss": (value, total(config, weights_BT))} | sums


def _k3(difference_BT: jax.Array) -> jax.Array:
    """exp(d) - d - 1: never negative, and 0 where d is."""
    return jnp.expm1(difference_BT) - difference_BT
