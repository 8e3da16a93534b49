"""Two models in one run: a student that learns from the logits of a larger teacher, which no step changes."""

import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.core import tree
from t5x_like.core.types import ArraySpec
from t5x_like.layers.scoring.head import logits
from t5x_like.objectives.interface import Objective, frozen_role, inputs, policy
from t5x_like.training import state as train_state
from t5x_like.training.step import make_step
from tests.models import cases
from tests.training.test_step import config, sgd

ARRAYS = {
    "inputs": ArraySpec((4, 8), "int32", ("batch", "length")),
    "loss_weights": ArraySpec((4, 8), "float32", ("batch", "length")),
}


def distill(roles, arrays) -> Objective:
    """Forward Kullback-Leibler divergence KL(teacher || student) of each token (arXiv 1503.02531, temperature 1)."""

    def log_probs(role, params, frozen, batch):
        whole = role.whole(params, frozen)
        hidden_BTD, head = role.model.score_input(whole, role.model.apply(whole, batch))
        logits_BTV = logits(hidden_BTD, head)[..., : head.vocab_size]
        return jax.nn.log_softmax(logits_BTV)

    def sums(params, frozen, batch):
        student_BTV = log_probs(roles["policy"], params, frozen, batch)
        teacher_BTV = jax.lax.stop_gradient(log_probs(roles["teacher"], params, frozen, batch))
        kl_BT = jnp.sum(jnp.exp(teacher_BTV) * (teacher_BTV - student_BTV), axis=-1)
        return jnp.sum(batch["loss_weights"] * kl_BT), jnp.sum(batch["loss_weights"])

    def loss(params, frozen, batch, key, totals):
        kl, count = sums(params, frozen, batch)
        return kl / totals["tokens"], {"kl": (kl, count)}

    read = inputs(arrays, ("inputs", "loss_weights"), optional=roles["policy"].model.inputs, objective="distill")
    weights = lambda batch: {"tokens": jnp.sum(batch["loss_weights"])}  # noqa: E731
    return Objective(weights, loss, lambda *rest: {"kl": sums(*rest)}, read, judge="kl")


def test_a_student_approaches_a_frozen_teacher_of_another_size_which_stays_as_it_is():
    student, teacher = cases.model("llama"), cases.model("llama", layers=3, mlp=64)
    objective = distill({"policy": policy(student), "teacher": frozen_role(teacher, "teacher")}, ARRAYS)
    params, base = tree.split(cases.random_params(student), lambda path: not path.startswith("embed/"))
    specs, _ = tree.split(student.specs(), lambda path: not path.startswith("embed/"))
    frozen = {"base": base, "teacher": cases.random_params(teacher, seed=1)}
    optimizer = sgd(0.3, specs)
    axes = tree.map_with_path(lambda _, spec: spec.axes, specs)
    step = jax.jit(
        make_step(objective, optimizer, rules=student.rules, param_axes=axes, config=config(micro_batches=2))
    )
    batch = {"inputs": cases.tokens(student, 4, 8), "loss_weights": jnp.ones((4, 8))}
    state, found = train_state.fresh(params, optimizer, ema=False), []
    for _ in range(8):
        state, metrics = step(state, frozen, batch)
        found.append(float(metrics["kl"]))
    assert found[-1] < 0.8 * found[0] and int(state["progress"]["skipped"]) == 0
    np.testing.assert_allclose(
        state["progress"]["loss_mean"], np.mean(found), rtol=1e-5
    )  # the judge is what is watched
    # A student that is its teacher has nothing to learn.
    same = distill({"policy": policy(student), "teacher": frozen_role(student, "teacher")}, ARRAYS)
    copied = {"base": base, "teacher": tree.join(params, base)}
    kl, count = jax.jit(same.evaluate)(params, copied, batch)["kl"]
    assert abs(float(kl / count)) < 1e-6
