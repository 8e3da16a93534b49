"""Distillation against its definition in torch at float64: values, gradients, micro-batches, meshes, what it does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from t5x_like.core import tree
from t5x_like.core.errors import UsageError
from t5x_like.core.types import ArraySpec
from t5x_like.layers.scoring.token_divergence import KINDS
from t5x_like.objectives import distill
from t5x_like.objectives.interface import frozen_role, policy
from t5x_like.parallel.sharding import tree_shardings
from t5x_like.training import state as train_state
from t5x_like.training.step import make_step
from tests.layers.scoring.world import make_mesh
from tests.models import cases
from tests.training.test_step import config, sgd

ROWS, LENGTH = 8, 8
OFFERED = ("inputs", "targets", "loss_weights", "target_bytes", "segment_ids")
ARRAYS = {name: ArraySpec((ROWS, LENGTH), "int32", ("batch", "length")) for name in OFFERED}
TEMPERATURE, WEIGHT = 2.0, 0.75


def build(student, teacher, *, divergence="forward_kl", temperature=TEMPERATURE, weight=WEIGHT):
    settings = distill.DistillConfig(divergence, temperature, weight)
    settings.check("config.objective.distill")
    return distill.build(settings, {"policy": policy(student), "teacher": frozen_role(teacher, "teacher")}, ARRAYS)


@functools.cache
def world():
    """(student, larger teacher, parameters, frozen, batch): weights of 0, 1 and between; two documents a row."""
    student, teacher = cases.model("llama"), cases.model("llama", layers=3, width=48, mlp=64)
    rng = np.random.default_rng(1)
    ids = np.asarray(cases.tokens(student, ROWS, LENGTH + 1))
    batch = {
        "inputs": ids[:, :-1],
        "targets": ids[:, 1:],
        "loss_weights": rng.choice(np.array([0, 1, 0.25], np.float32), (ROWS, LENGTH), p=[0.3, 0.4, 0.3]),
        "target_bytes": np.ones((ROWS, LENGTH), np.int32),
        "segment_ids": np.where(np.arange(LENGTH)[None, :] < 5, 1, 2).repeat(ROWS, 0).astype(np.int32),
    }
    frozen = {"base": {}, "teacher": cases.random_params(teacher, seed=1)}
    return student, teacher, cases.random_params(student), frozen, {name: jnp.asarray(x) for name, x in batch.items()}


@functools.cache
def hidden():
    """(hidden states of student and teacher, what pulls a gradient of the student's back to its parameters)."""
    student, teacher, params, frozen, batch = world()
    of_student, pull = jax.vjp(lambda params: student.apply(params, batch).hidden_BTD, params)
    return np.asarray(of_student), np.asarray(teacher.apply(frozen["teacher"], batch).hidden_BTD), pull


def expected(kind):
    """(loss, gradients by path, mean divergence, mean cross entropy), by torch."""
    student, _, params, frozen, batch = world()
    of_student, of_teacher, pull = hidden()
    x = torch.tensor(of_student, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor(np.asarray(params["head"]["weight"]), dtype=torch.float64, requires_grad=True)
    real = student.config.vocab_size
    logits = x @ weight[:real].T
    theirs = torch.tensor(of_teacher, dtype=torch.float64) @ torch.tensor(
        np.asarray(frozen["teacher"]["head"]["weight"][:real]), dtype=torch.float64
    ).T  # fmt: skip
    log_p, log_q = (torch.log_softmax(each / TEMPERATURE, -1) for each in (logits, theirs))
    log_m = ((log_p.exp() + log_q.exp()) / 2).log()
    to_p, to_q = (log_q.exp() * (log_q - log_p)).sum(-1), (log_p.exp() * (log_p - log_q)).sum(-1)
    halves = ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1)) / 2
    each = {"forward_kl": to_p, "reverse_kl": to_q, "jensen_shannon": halves}[kind]
    targets = torch.tensor(np.asarray(batch["targets"]), dtype=torch.int64)
    nll = torch.nn.functional.cross_entropy(logits.reshape(-1, real), targets.reshape(-1), reduction="none")
    weights = torch.tensor(np.asarray(batch["loss_weights"]), dtype=torch.float64)
    divergence, nll = ((weights * term).sum() / weights.sum() for term in (each, nll.reshape(weights.shape)))
    loss = WEIGHT * TEMPERATURE**2 * divergence + (1 - WEIGHT) * nll
    loss.backward()
    (gradients,) = pull(jnp.asarray(x.grad.numpy(), jnp.float32))
    return loss.item(), tree.flatten(gradients) | {"head/weight": weight.grad.numpy()}, divergence.item(), nll.item()


@functools.cache
def found(kind, mesh=None):
    """(loss, gradients by path, sums) of the objective, on one device or on a mesh of these sizes."""
    student, teacher, params, frozen, batch = world()
    objective = build(student, teacher, divergence=kind)

    def loss(params, frozen):
        return objective.loss(params, frozen, batch, None, objective.weights(batch))

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    if mesh is None:
        (value, sums), gradients = step(params, frozen)
    else:
        made = make_mesh(dict(mesh))
        params = jax.device_put(params, tree_shardings(made, student.rules, student.specs()))
        placed = jax.device_put(frozen["teacher"], tree_shardings(made, teacher.rules, teacher.specs()))
        with jax.set_mesh(made):
            (value, sums), gradients = step(params, {"base": {}, "teacher": placed})
    means = {name: float(total / count) for name, (total, count) in sums.items()}
    return float(value), tree.flatten(jax.device_get(gradients)), means


def check(result, reference):
    value, gradients, means = result
    loss, references, divergence, nll = reference
    assert divergence > 0.05  # that of Jensen-Shannon is at most log 2
    assert value == pytest.approx(loss, rel=1e-6)
    assert means == {"loss": pytest.approx(nll, rel=1e-6), "divergence": pytest.approx(divergence, rel=1e-5)}
    assert set(gradients) == set(references)
    for path, gradient in gradients.items():
        assert cases.largest_difference(gradient, references[path]) < 1e-5, path


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_every_gradient_are_those_of_the_definition(kind):
    check(found(kind), expected(kind))


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["fsdp", "tensor"])
def test_meshes_compute_the_same(mesh):
    check(found("forward_kl", tuple(mesh.items())), expected("forward_kl"))


def test_a_student_approaches_its_teacher_which_gets_no_gradient_in_micro_batches_as_in_one():
    student, teacher, params, frozen, batch = world()
    objective = build(student, teacher)
    gradients = jax.grad(lambda frozen: objective.loss(params, frozen, batch, None, objective.weights(batch))[0])(
        frozen
    )
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(gradients))
    optimizer = sgd(0.2, student.specs())
    axes = tree.map_with_path(lambda _, spec: spec.axes, student.specs())
    seen = {}
    for parts in (1, 2):
        step = make_step(objective, optimizer, rules=student.rules, param_axes=axes, config=config(micro_batches=parts))
        step, state = jax.jit(step), train_state.fresh(params, optimizer, ema=False)
        seen[parts] = []
        for _ in range(8):
            state, metrics = step(state, frozen, batch)
            seen[parts].append(float(metrics["divergence"]))
    assert seen[1][-1] < 0.8 * seen[1][0] and int(state["progress"]["skipped"]) == 0
    np.testing.assert_allclose(seen[2], seen[1], rtol=1e-4)
    np.testing.assert_allclose(state["progress"]["loss_mean"], np.mean(seen[2]), rtol=1e-5)  # what is judged


def test_held_out_sums_say_how_often_student_and_teacher_agree():
    student, _, params, _, batch = world()
    near = jax.tree.map(lambda one, other: one + 0.2 * other, params, cases.random_params(student, seed=2))
    sums = jax.jit(build(student, student).evaluate)(params, {"base": {}, "teacher": near}, batch)
    means = {name: float(total / weight) for name, (total, weight) in sums.items()}
    of_student, of_teacher = hidden()[0], np.asarray(student.apply(near, batch).hidden_BTD)
    real, weights = student.config.vocab_size, np.asarray(batch["loss_weights"])
    best = [
        (states @ np.asarray(head[:real]).T).argmax(-1)
        for states, head in ((of_student, params["head"]["weight"]), (of_teacher, near["head"]["weight"]))
    ]
    agreement = (weights * (best[0] == best[1])).sum() / weights.sum()
    assert 0 < agreement < 1 and means["teacher_agreement"] == pytest.approx(agreement)
    assert 0 < means["divergence"] < found("forward_kl")[2]["divergence"]
    assert means["loss"] == pytest.approx(found("forward_kl")[2]["loss"], rel=1e-5)
    assert {"bits_per_byte", "accuracy"} <= means.keys()


def test_an_encoder_decoder_that_is_its_teacher_has_nothing_to_learn():
    model = cases.model("t5")
    params, batch = cases.random_params(model), cases.batch(model, 2, 6)
    arrays = {name: ArraySpec(x.shape, "int32", ("batch", "length")) for name, x in batch.items()}
    batch |= {"targets": batch["inputs"], "loss_weights": jnp.ones((2, 6)), "target_bytes": jnp.ones((2, 6), "int32")}
    roles = {"policy": policy(model), "teacher": frozen_role(model, "teacher")}
    objective = distill.build(distill.DistillConfig("jensen_shannon", 1.0, 1.0), roles, ARRAYS | arrays)
    assert "encoder_inputs" in objective.inputs
    sums = jax.jit(objective.evaluate)(params, {"base": {}, "teacher": params}, batch)
    assert abs(float(sums["divergence"][0] / sums["divergence"][1])) < 1e-6
    assert float(sums["teacher_agreement"][0] / sums["teacher_agreement"][1]) == 1


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("llama", {"vocab_size": 60}, "config.model.vocab_size=61, but config.roles.teacher has 60; .* same tokenizer"),
        ("llama", {"vocab_multiple": 128}, "vocab_multiple=32 stores 64 rows .*teacher has 128; set it to 128"),
        ("t5", {}, "config.model.architecture='decoder', but config.roles.teacher has 'encoder_decoder'"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(family, fields, message):
    with pytest.raises(UsageError, match=message):
        build(cases.model("llama"), cases.model(family, **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"divergence": "kl"}, "divergence='kl' is unknown"),
        ({"temperature": 0.0}, "temperature=0 should be above 0"),
        ({"weight": 0.0}, "weight=0 should be above 0 and at most 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields, message):
    with pytest.raises(UsageError, match=message):
        build(cases.model("llama"), cases.model("llama"), **fields)
