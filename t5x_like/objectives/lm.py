"""Next-token prediction: cross entropy, z-loss and label smoothing over weighted tokens. The default objective.

Names: B batch, T query length, D model, V vocabulary.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from t5x_like.core.errors import UsageError
from t5x_like.core.types import ArraySpec
from t5x_like.layers.scoring.token_loss import token_loss
from t5x_like.layers.scoring.token_scores import Scores, token_scores
from t5x_like.objectives.interface import Batch, Objective, Role, Sums, inputs

READ = ("inputs", "targets", "loss_weights", "target_bytes")
HELD_OUT = ("logp", "best")  # the scores that `held_out_sums` needs


@dataclasses.dataclass(frozen=True)
class LmConfig:
    """`z_loss`: coefficient of the mean of (log Z)^2 (arXiv 2204.02311, section 5); `label_smoothing`: in [0, 1)."""

    z_loss: float
    label_smoothing: float

    def check(self, path: str) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UsageError(f"{path}.label_smoothing={self.label_smoothing:g} should be in [0, 1)")
        if not self.z_loss >= 0:
            raise UsageError(f"{path}.z_loss={self.z_loss:g} should not be negative")


def build(config: LmConfig, roles: Mapping[str, Role], arrays: Mapping[str, ArraySpec]) -> Objective:
    model, whole = roles["policy"].model, roles["policy"].whole
    if config.label_smoothing and model.config.head.softcap:
        raise UsageError("config.objective.lm.label_smoothing needs linear logits; set config.model.head.softcap=0")

    want = {"logp"}
    want |= {"logz", "mean"} if config.label_smoothing else set()
    want |= {"logz"} if config.z_loss else set()

    def hidden_and_head(params, frozen, batch: Batch, key):
        parameters = whole(params, frozen)
        return model.score_input(parameters, model.apply(parameters, batch, key=key))

    def of_tokens(scores: Scores, weights) -> tuple[jax.Array, dict[str, jax.Array]]:
        nll = -jnp.sum(weights * scores.logp)
        total, sums = nll, {"loss": nll}
        if config.label_smoothing:
            smooth = scores.logz - scores.mean
            total = (1 - config.label_smoothing) * nll + config.label_smoothing * jnp.sum(weights * smooth)
        if config.z_loss:
            z_loss = config.z_loss * jnp.sum(weights * jnp.square(scores.logz))
            total, sums = total + z_loss, sums | {"z_loss": z_loss}
        return total, sums

    def weights(batch: Batch) -> dict[str, jax.Array]:
        return {"tokens": jnp.sum(batch["loss_weights"])}

    def loss(params, frozen, batch: Batch, key, totals) -> tuple[jax.Array, Sums]:
        hidden_BTD, head = hidden_and_head(params, frozen, batch, key)
        weights_BT = batch["loss_weights"]
        count = jnp.sum(weights_BT)
        value, sums = token_loss(of_tokens, hidden_BTD, head, batch["targets"], weights_BT, totals["tokens"], want=want)
        return value, {name: (value, count) for name, value in sums.items()}

    def evaluate(params, frozen, batch: Batch) -> Sums:
        hidden_BTD, head = hidden_and_head(params, frozen, batch, None)
        return held_out_sums(token_scores(hidden_BTD, head, batch["targets"], want=HELD_OUT), batch)

    read = inputs(arrays, READ, optional=model.inputs, objective="lm")
    return Objective(weights, loss, evaluate, read)


def held_out_sums(scores: Scores, batch: Batch) -> Sums:
    """Cross entropy, bits per byte and accuracy of the predictions of held-out tokens."""
    weights_BT = batch["loss_weights"]
    nll, count = -jnp.sum(weights_BT * scores.logp), jnp.sum(weights_BT)
    # Bytes of the text, counted where a token is scored: the measure that no tokenizer can flatter.
    text_bytes = jnp.sum(jnp.where(weights_BT > 0, batch["target_bytes"], 0).astype(jnp.float32))
    return {
        "loss": (nll, count),
        "bits_per_byte": (nll / jnp.log(2.0), text_bytes),
        "accuracy": (jnp.sum(weights_BT * (scores.best == batch["targets"])), count),
    }
