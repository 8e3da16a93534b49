"""The `lm` objective against torch's cross entropy: loss, z-loss, label smoothing, gradients, held-out sums."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from t5x_like.core import tree
from t5x_like.core.errors import UsageError
from t5x_like.core.types import ArraySpec
from t5x_like.objectives import lm
from t5x_like.objectives.interface import policy
from t5x_like.parallel import mesh as meshes
from t5x_like.parallel.mesh import MeshConfig
from tests.models import cases

FROZEN = {"base": {}}
OFFERED = ("inputs", "targets", "loss_weights", "target_bytes", "segment_ids", "chosen/inputs")
ARRAYS = {name: ArraySpec((3, 8), "int32", ("batch", "length")) for name in OFFERED}


def build(model, *, z_loss: float, label_smoothing: float):
    config = lm.LmConfig(z_loss=z_loss, label_smoothing=label_smoothing)
    return lm.build(config, {"policy": policy(model)}, ARRAYS)


@functools.cache
def world():
    """(model, parameters, batch): a vocabulary of 61 stored as 64, weights of 0, 1 and between."""
    model = cases.model("llama")
    rng = np.random.default_rng(1)
    ids = np.asarray(cases.tokens(model, 3, 9))
    weights = rng.choice(np.array([0, 1, 0.25], np.float32), (3, 8), p=[0.3, 0.4, 0.3])
    batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:], "loss_weights": weights}
    batch["target_bytes"] = rng.integers(0, 5, (3, 8)).astype(np.int32)
    assert model.config.padded_vocab > model.config.vocab_size and (weights == 0).any()
    return model, cases.random_params(model), {name: jnp.asarray(value) for name, value in batch.items()}


def torch_losses(*, label_smoothing: float, z_loss: float):
    """(mean loss, its gradient by the head's weight) in double precision, from the model's hidden states."""
    model, params, batch = world()
    hidden = torch.tensor(np.asarray(model.apply(params, batch).hidden_BTD), dtype=torch.float64).reshape(24, -1)
    weight = torch.tensor(np.asarray(params["head"]["weight"]), dtype=torch.float64, requires_grad=True)
    logits = hidden @ weight[: model.config.vocab_size].T
    targets = torch.tensor(np.asarray(batch["targets"]).reshape(-1), dtype=torch.int64)
    each = torch.nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    each = each + z_loss * torch.logsumexp(logits, -1) ** 2
    weights = torch.tensor(np.asarray(batch["loss_weights"]).reshape(-1), dtype=torch.float64)
    loss = (each * weights).sum() / weights.sum()
    loss.backward()
    return loss.item(), weight.grad.numpy()


def lm_losses(*, label_smoothing: float, z_loss: float):
    """(loss, gradients, sums) of the objective."""
    model, params, batch = world()
    objective = build(model, z_loss=z_loss, label_smoothing=label_smoothing)

    def loss(params):
        return objective.loss(params, FROZEN, batch, None, objective.weights(batch))

    (value, sums), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return float(value), tree.flatten(gradients), sums


TERMS = [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.3, 1e-2)]


@pytest.mark.parametrize("label_smoothing,z_loss", TERMS)
def test_loss_and_the_gradient_of_the_head_are_those_of_torch(label_smoothing, z_loss):
    expected, gradient = torch_losses(label_smoothing=label_smoothing, z_loss=z_loss)
    value, gradients, _ = lm_losses(label_smoothing=label_smoothing, z_loss=z_loss)
    assert value == pytest.approx(expected, rel=1e-6)
    assert cases.largest_difference(gradients["head/weight"], gradient) < 1e-5
    if (label_smoothing, z_loss) != TERMS[0]:
        assert abs(value - torch_losses(label_smoothing=0.0, z_loss=0.0)[0]) > 1e-3 * value


def test_what_is_logged_as_loss_is_the_cross_entropy_alone():
    plain, _ = torch_losses(label_smoothing=0.0, z_loss=0.0)
    _, _, sums = lm_losses(label_smoothing=0.3, z_loss=1e-2)
    assert float(sums["loss"][0] / sums["loss"][1]) == pytest.approx(plain, rel=1e-6)
    assert float(sums["z_loss"][0] / sums["z_loss"][1]) == pytest.approx(
        torch_losses(label_smoothing=0.0, z_loss=1e-2)[0] - plain, rel=1e-4
    )


def test_held_out_sums_are_loss_bits_of_scored_bytes_and_hits():
    model, params, batch = world()
    objective = build(model, z_loss=1e-2, label_smoothing=0.1)
    found = {name: float(total / weight) for name, (total, weight) in objective.evaluate(params, FROZEN, batch).items()}
    hidden = np.asarray(model.apply(params, batch).hidden_BTD, np.float64)
    logits = hidden @ np.asarray(params["head"]["weight"], np.float64)[: model.config.vocab_size].T
    targets, weights = np.asarray(batch["targets"]), np.asarray(batch["loss_weights"])
    logp = np.take_along_axis(logits, targets[..., None], -1)[..., 0] - np.log(np.exp(logits).sum(-1))
    scored = np.asarray(batch["target_bytes"])[weights > 0].sum()
    assert found["loss"] == pytest.approx(-(weights * logp).sum() / weights.sum(), rel=1e-6)
    assert found["accuracy"] == pytest.approx((weights * (logits.argmax(-1) == targets)).sum() / weights.sum())
    assert found["bits_per_byte"] == pytest.approx(-(weights * logp).sum() / np.log(2) / scored, rel=1e-6)


def test_held_out_accuracy_costs_no_second_gather_of_the_head():
    model, params, batch = world()
    objective = build(model, z_loss=0.0, label_smoothing=0.0)
    four = {name: jnp.concatenate([value, value[:1]]) for name, value in batch.items()}
    with jax.set_mesh(meshes.make(MeshConfig("fsdp", "", *[None] * 7), jax.devices()[:4])):
        text = jax.jit(objective.evaluate).lower(params, FROZEN, four).as_text()
    assert text.count("stablehlo.all_gather") == 1  # only the scorer asks for one by name


def test_label_smoothing_of_capped_logits_is_refused():
    with pytest.raises(UsageError, match="label_smoothing needs linear logits"):
        build(cases.model("local_and_global"), z_loss=0.0, label_smoothing=0.1)


def test_the_objective_declares_what_it_and_its_model_read_of_what_the_data_offers():
    model = cases.model("llama")
    assert set(build(model, z_loss=0.0, label_smoothing=0.0).inputs) == set(OFFERED) - {"chosen/inputs"}
    with pytest.raises(UsageError, match="'lm' reads 'target_bytes', which this data does not have; it has chosen/"):
        lm.build(
            lm.LmConfig(0.0, 0.0), {"policy": policy(model)}, {n: ARRAYS[n] for n in OFFERED if n[:8] != "target_b"}
        )
