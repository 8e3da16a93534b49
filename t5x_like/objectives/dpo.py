"""Direct preference optimisation: a policy learns from pairs of answers, kept near a reference (arXiv 2305.18290,
equation 7).

    delta = (log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected))
    loss = -(1 - smoothing) log sigmoid(beta delta) - smoothing log sigmoid(-beta delta)

log p is the sum over the tokens of the answer, or their mean with `length_normalized`; the smoothing is that of labels
which are wrong with this probability (conservative DPO). Before the first update the loss is log 2.

`reference` says where log p_ref comes from: "role", a second model (config.roles.reference); "cache", sums that this
model gave before the first step and that lie beside the tokens, so that no step holds it; "base", the policy without
its adapter (config.adapter); "none", a reference that gives every answer the same probability.

Names: B pairs, T length of a text.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError
from t5x_like.core.types import ArraySpec
from t5x_like.layers.scoring.token_scores import token_scores
from t5x_like.models.model import Model
from t5x_like.objectives import pairs
from t5x_like.objectives.interface import Batch, Objective, Role, Sums

REFERENCES = ("role", "base", "cache", "none")
LOGP = "reference_logp"  # of each side, [B]: what "cache" reads, sums over the tokens of an answer


@dataclasses.dataclass(frozen=True)
class DpoConfig:
    """`beta`: how strongly the policy is kept near the reference; `label_smoothing`: in [0, 0.5)."""

    beta: float
    label_smoothing: float
    length_normalized: bool
    reference: str

    def check(self, path: str) -> None:
        if not 0 < self.beta < float("inf"):
            raise UsageError(f"{path}.beta={self.beta:g} should be a number above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise UsageError(f"{path}.label_smoothing={self.label_smoothing:g} should be in [0, 0.5)")
        if self.reference not in REFERENCES:
            raise UsageError(f"{path}.reference={self.reference!r} is unknown; {nearest(self.reference, REFERENCES)}")

    @property
    def roles(self) -> tuple[str, ...]:
        """The models that a step reads besides the policy."""
        return ("reference",) if self.reference == "role" else ()

    @property
    def cached_roles(self) -> tuple[str, ...]:
        """The models whose log-probabilities are read from the token cache instead."""
        return ("reference",) if self.reference == "cache" else ()


def build(config: DpoConfig, roles: Mapping[str, Role], arrays: Mapping[str, ArraySpec]) -> Objective:
    policy, reference = roles["policy"], roles.get("base" if config.reference == "base" else "reference")
    if config.reference == "role" and reference is not None:
        check_reference(policy.model, reference.model)
    if config.reference == "base" and "base" not in roles:
        raise UsageError(
            "config.objective.dpo.reference='base' is the policy without its adapter, and this run trains the model "
            "itself; set config.adapter.name='lora', or use 'role' with config.roles.reference"
        )

    def reference_logp(params, frozen, batch: Batch, both: Batch) -> tuple[jax.Array, ...]:
        """(chosen, rejected), each [B]; no gradient."""
        if config.reference == "cache":
            found = cached_logp(batch, mean=config.length_normalized)
        elif config.reference == "none":
            found = (jnp.zeros(()),) * 2
        else:
            assert reference is not None, "the table of objectives has asked for it"
            found = pairs.sides(answer_logp(reference, params, frozen, both, mean=config.length_normalized, key=None))
        return jax.lax.stop_gradient(found)

    def real(batch: Batch) -> jax.Array:
        """1 for each pair of which both answers have tokens."""
        counts = [jnp.sum(batch[f"{side}/loss_weights"], axis=1) for side in pairs.SIDES]
        return ((counts[0] > 0) & (counts[1] > 0)).astype(jnp.float32)

    def weights(batch: Batch) -> dict[str, jax.Array]:
        return {"pairs": jnp.sum(real(batch))}

    def compare(params, frozen, batch: Batch, key) -> Sums:
        both = pairs.texts({name: x for name, x in batch.items() if not name.endswith(LOGP)})
        logp = pairs.sides(answer_logp(policy, params, frozen, both, mean=config.length_normalized, key=key))
        reference = reference_logp(params, frozen, batch, both)
        chosen_B, rejected_B = (config.beta * (mine - its) for mine, its in zip(logp, reference, strict=True))
        margin_B = chosen_B - rejected_B
        smooth = config.label_smoothing
        loss_B = -(1 - smooth) * jax.nn.log_sigmoid(margin_B) - smooth * jax.nn.log_sigmoid(-margin_B)
        real_B = real(batch)
        reported = {
            "loss": loss_B,
            "accuracy": margin_B > 0,
            "margin": margin_B,
            "reward_chosen": chosen_B,
            "reward_rejected": rejected_B,
            "logp_chosen": logp[0],
            "logp_rejected": logp[1],
        }
        return {name: (jnp.sum(real_B * value), jnp.sum(real_B)) for name, value in reported.items()}

    def loss(params, frozen, batch: Batch, key, totals) -> tuple[jax.Array, Sums]:
        sums = compare(params, frozen, batch, key)
        return sums["loss"][0] / totals["pairs"], sums

    def evaluate(params, frozen, batch: Batch) -> Sums:
        return compare(params, frozen, batch, None)

    names = ("inputs", "targets", "loss_weights", *((LOGP,) if config.reference == "cache" else ()))
    read = pairs.needed(arrays, names, optional=policy.model.inputs, objective="dpo")
    return Objective(weights, loss, evaluate, read)


def cached_logp(batch: Batch, *, mean: bool) -> tuple[jax.Array, ...]:
    """(chosen, rejected) of the token cache, sums or means over the tokens of an answer, each [B]."""
    sums = (batch[f"{side}/{LOGP}"] for side in pairs.SIDES)
    counts = (jnp.sum(batch[f"{side}/loss_weights"], axis=1) for side in pairs.SIDES)
    return tuple(x / jnp.maximum(count, 1) if mean else x for x, count in zip(sums, counts, strict=True))


def check_reference(policy: Model, reference: Model) -> None:
    """Raises UsageError for a reference that reads other arrays than the policy, or other tokens."""
    for field in ("architecture", "vocab_size"):
        mine, its = (getattr(model.config, field) for model in (policy, reference))
        if mine != its:
            raise UsageError(
                f"config.roles.reference is a model of {field}={its!r}, and config.model.{field}={mine!r}: both read "
                "the same rows; give a reference of the same kind"
            )


def answer_logp(role: Role, params, frozen, batch: Batch, *, mean: bool, key) -> jax.Array:
    """The log-probability of each row's answer, the sum over its weighted tokens, or their mean; float32."""
    parameters = role.whole(params, frozen)
    hidden_BTD, head = role.model.score_input(parameters, role.model.apply(parameters, batch, key=key))
    logp_BT = token_scores(hidden_BTD, head, batch["targets"], want=("logp",)).logp
    weights_BT = batch["loss_weights"]
    total_B = jnp.sum(weights_BT * logp_BT, axis=1)
    return total_B / jnp.maximum(jnp.sum(weights_BT, axis=1), 1) if mean else total_B
