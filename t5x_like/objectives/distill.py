"""Distillation: a student learns the next-token distributions of a frozen teacher (arXiv 1503.02531, section 2).

    loss = weight * temperature^2 * D + (1 - weight) * cross entropy

D is the divergence of the softmax of both models' logits, each divided by the temperature, a mean over weighted tokens.
Its gradient shrinks like 1 / temperature^2, whichever of the three divergences it is; the factor keeps the two terms in
proportion when the temperature changes. Logits of all tokens are not held where they are large (layers/scoring). The
student must read the tokenizer and the arrays of its teacher; matching hidden states is not here.

Names: B batch, T query length, D model, E model of the teacher.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError
from t5x_like.core.types import ArraySpec
from t5x_like.layers.scoring.token_divergence import KINDS, token_divergence
from t5x_like.layers.scoring.token_scores import token_scores
from t5x_like.models.model import Model
from t5x_like.objectives.interface import Batch, Objective, Role, Sums, inputs
from t5x_like.objectives.lm import HELD_OUT, READ, held_out_sums


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """`divergence`: "forward_kl" (from teacher to student), "reverse_kl" or "jensen_shannon". `temperature`: of both
    models; `weight`: of the divergence, the cross entropy has the rest; 1 is the teacher alone."""

    divergence: str
    temperature: float
    weight: float

    def check(self, path: str) -> None:
        if self.divergence not in KINDS:
            raise UsageError(f"{path}.divergence={self.divergence!r} is unknown; {nearest(self.divergence, KINDS)}")
        if not self.temperature > 0:
            raise UsageError(f"{path}.temperature={self.temperature:g} should be above 0")
        if not 0 < self.weight <= 1:
            raise UsageError(f"{path}.weight={self.weight:g} should be above 0 and at most 1; 0 is the objective 'lm'")


def build(config: DistillConfig, roles: Mapping[str, Role], arrays: Mapping[str, ArraySpec]) -> Objective:
    student, teacher = roles["policy"], roles["teacher"]
    _check_fit(student.model, teacher.model)

    def both(params, frozen, batch: Batch, key):
        """What the scorer reads of the student, and of the teacher."""
        parameters, others = student.whole(params, frozen), teacher.whole(params, frozen)
        return (
            student.model.score_input(parameters, student.model.apply(parameters, batch, key=key)),
            teacher.model.score_input(others, teacher.model.apply(others, batch)),
        )

    def divergence(of_student, of_teacher, weights_BT: jax.Array) -> jax.Array:
        each_BT = token_divergence(*of_student, *of_teacher, kind=config.divergence, temperature=config.temperature)
        return jnp.sum(weights_BT * each_BT)

    def weights(batch: Batch) -> dict[str, jax.Array]:
        return {"tokens": jnp.sum(batch["loss_weights"])}

    def loss(params, frozen, batch: Batch, key, totals) -> tuple[jax.Array, Sums]:
        of_student, of_teacher = both(params, frozen, batch, key)
        weights_BT = batch["loss_weights"]
        nll = -jnp.sum(weights_BT * token_scores(*of_student, batch["targets"], want=("logp",)).logp)
        diverging = divergence(of_student, of_teacher, weights_BT)
        count = jnp.sum(weights_BT)
        total = config.weight * config.temperature**2 * diverging + (1 - config.weight) * nll
        return total / totals["tokens"], {"loss": (nll, count), "divergence": (diverging, count)}

    def evaluate(params, frozen, batch: Batch) -> Sums:
        of_student, of_teacher = both(params, frozen, batch, None)
        weights_BT, targets_BT = batch["loss_weights"], batch["targets"]
        scores = token_scores(*of_student, targets_BT, want=HELD_OUT)
        theirs = token_scores(*of_teacher, targets_BT, want=("best",))
        count = jnp.sum(weights_BT)
        return held_out_sums(scores, batch) | {
            "divergence": (divergence(of_student, of_teacher, weights_BT), count),
            "teacher_agreement": (jnp.sum(weights_BT * (scores.best == theirs.best)), count),
        }

    read = inputs(arrays, READ, optional=student.model.inputs, objective="distill")
    return Objective(weights, loss, evaluate, read, judge="divergence")


def _check_fit(student: Model, teacher: Model) -> None:
    """The teacher must say something about the same tokens, read from the same arrays."""
    mine, theirs = student.config, teacher.config
    for field, remedy in (
        ("vocab_size", "a divergence needs models with the same tokenizer"),
        ("architecture", "both must read the same arrays"),
    ):
        if getattr(mine, field) != getattr(theirs, field):
            raise UsageError(
                f"config.model.{field}={getattr(mine, field)!r}, but config.roles.teacher has "
                f"{getattr(theirs, field)!r}; {remedy}"
            )
    if mine.padded_vocab != theirs.padded_vocab:
        raise UsageError(
            f"config.model.vocab_multiple={mine.vocab_multiple} stores {mine.padded_vocab} rows of the vocabulary, but "
            f"config.roles.teacher has {theirs.padded_vocab}; set it to {theirs.vocab_multiple}"
        )
