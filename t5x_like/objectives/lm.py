"""Next-token prediction: cross entropy, z-loss and label smoothing over weighted tokens. The default objective.

Names: B batch, T query length, D model, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp

from t5x_like.core import tree
from t5x_like.core.errors import UsageError
from t5x_like.layers.token_log_probs import mean_logits, token_log_probs, token_predictions
from t5x_like.models.model import Model
from t5x_like.objectives.interface import Batch, Objective, Sums


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


def build(config: LmConfig, model: Model) -> Objective:
    if config.label_smoothing and model.config.final_softcap:
        raise UsageError("config.objective.lm.label_smoothing needs linear logits; set model.final_softcap=0")

    def scores(params, frozen, batch: Batch, key):
        whole = tree.join(params, frozen["base"])
        hidden_BTD = model.apply(whole, batch, key=key).hidden_BTD
        return hidden_BTD, model.head(whole)

    def weights(batch: Batch) -> dict[str, jax.Array]:
        return {"tokens": jnp.sum(batch["loss_weights"])}

    def loss(params, frozen, batch: Batch, key, totals) -> tuple[jax.Array, Sums]:
        hidden_BTD, head = scores(params, frozen, batch, key)
        logp_BT, logz_BT = token_log_probs(hidden_BTD, head, batch["targets"])
        weights_BT = batch["loss_weights"]
        count = jnp.sum(weights_BT)
        nll = -jnp.sum(weights_BT * logp_BT)
        total, sums = nll, {"loss": (nll, count)}
        if config.label_smoothing:
            smooth_BT = logz_BT - mean_logits(hidden_BTD, head)
            total = (1 - config.label_smoothing) * nll + config.label_smoothing * jnp.sum(weights_BT * smooth_BT)
        if config.z_loss:
            z_loss = config.z_loss * jnp.sum(weights_BT * jnp.square(logz_BT))
            total, sums = total + z_loss, sums | {"z_loss": (z_loss, count)}
        return total / totals["tokens"], sums

    def evaluate(params, frozen, batch: Batch) -> Sums:
        hidden_BTD, head = scores(params, frozen, batch, None)
        logp_BT, _ = token_log_probs(hidden_BTD, head, batch["targets"])
        correct_BT = token_predictions(hidden_BTD, head) == batch["targets"]
        weights_BT = batch["loss_weights"]
        nll, count = -jnp.sum(weights_BT * logp_BT), jnp.sum(weights_BT)
        # Bytes of the text, counted where a token is scored: the measure that no tokenizer can flatter.
        text_bytes = jnp.sum(jnp.where(weights_BT > 0, batch["target_bytes"], 0).astype(jnp.float32))
        return {
            "loss": (nll, count),
            "bits_per_byte": (nll / jnp.log(2.0), text_bytes),
            "accuracy": (jnp.sum(weights_BT * correct_BT), count),
        }

    return Objective(weights, loss, evaluate)
