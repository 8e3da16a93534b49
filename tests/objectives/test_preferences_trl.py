"""DPO and reward models beside TRL's trainers: loss and gradient of every parameter, on trained weights."""

import dataclasses
import functools
import pathlib
import shutil

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
import trl

from t5x_like.convert.stored import open_model
from t5x_like.core import tree
from t5x_like.core.dtypes import DtypePolicy
from t5x_like.core.types import ArraySpec
from t5x_like.models.model import Model
from t5x_like.objectives import dpo, pairs, reward
from t5x_like.objectives.interface import frozen_role, policy
from t5x_like.parallel.rules import rules
from tests.models import cases

STORIES = pathlib.Path(__file__).parents[1] / "data/stories260K"
TEXTS = [
    ("Once upon a time", " there was a little girl named Lily.", " the the the dog."),
    ("Tom had a red ball. He", " played with it in the park with his mom.", " was it."),
    ("The sun", " was hot.", " is a very big cat and it can not see the moon or the day."),
    ("One day,", " a bird saw a big tree.", " one day, one day, one."),
]


@functools.cache
def folder(base):
    """A copy of the weights that have moved a little: the policy, where the originals are the reference."""
    model = transformers.LlamaForCausalLM.from_pretrained(STORIES)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * weight.std() * torch.randn_like(weight))
    model.save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(STORIES / name, base)
    return str(base)


def ours(path):
    """(model, parameters) of a folder of transformers."""
    stored = open_model(str(path))
    model = Model(stored.config, rules(""), DtypePolicy("float32", "float32"))
    return model, stored.read(tree.map_with_path(lambda _, s: jax.ShapeDtypeStruct(s.shape, s.dtype), model.specs()))


def gradients_of(model, base, tmp_path):
    """The gradients of a torch model as our tree: written as if they were its weights, and read by the converter."""
    place = tmp_path / "gradients"
    shutil.copytree(base, place)
    grown = transformers.LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for mine, theirs in zip(grown.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs.grad)
    grown.save_pretrained(place)
    return tree.flatten(ours(place)[1])


def rows():
    return datasets.Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in TEXTS])


def arrays(batch):
    return {name: ArraySpec(x.shape, "int32", ("batch", "length")) for name, x in batch.items()}


# TRL's "sigmoid" knows no label smoothing; its "aot" of one pair is that loss with it.
@pytest.mark.parametrize(("kind", "smoothing"), [("sigmoid", 0.0), ("sigmoid_norm", 0.0), ("aot", 0.2)])
def test_dpo_is_that_of_trl(kind, smoothing, tmp_path, tmp_path_factory):
    base = folder(tmp_path_factory.getbasetemp() / "policy")
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=4, loss_type=[kind], beta=0.3, report_to=[],
        label_smoothing=smoothing, use_cpu=True, bf16=False, gradient_checkpointing=False, disable_dropout=True,
        max_length=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM.from_pretrained(base).double()
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=transformers.LlamaForCausalLM.from_pretrained(STORIES).double(),
        args=arguments,
        train_dataset=rows(),
        processing_class=transformers.AutoTokenizer.from_pretrained(base),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    of_pairs = [{name: x.reshape(2, 4, -1)[:, row] for name, x in batch.items()} for row in range(4)]
    parts = of_pairs if kind == "aot" else [dict(batch)]
    theirs = sum(trainer.compute_loss(trainer.model, part) for part in parts) / len(parts)
    theirs.backward()

    model_of_ours, params = ours(base)
    reference = ours(STORIES)[1]
    both = {}
    for side, ids, inside, answer in zip(
        pairs.SIDES,
        *(batch[name].numpy().reshape(2, 4, -1) for name in ("input_ids", "attention_mask", "completion_mask")),
        strict=True,
    ):
        both |= {
            f"{side}/inputs": ids[:, :-1],
            f"{side}/targets": ids[:, 1:],
            f"{side}/loss_weights": answer[:, 1:].astype(np.float32),
            f"{side}/segment_ids": inside[:, :-1],
        }
    both = {name: jnp.asarray(x, jnp.float32 if x.dtype == np.float32 else jnp.int32) for name, x in both.items()}
    config = dpo.DpoConfig(0.3, smoothing, length_normalized=kind == "sigmoid_norm", reference="role")
    roles = {"policy": policy(model_of_ours), "reference": frozen_role(model_of_ours, "reference")}
    objective = dpo.build(config, roles, arrays(both))

    def loss(params):
        frozen = {"base": {}, "reference": reference}
        return objective.loss(params, frozen, both, None, objective.weights(both))[0]

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    assert abs(theirs.item() - np.log(2)) > 1e-3
    assert float(value) == pytest.approx(theirs.item(), rel=1e-6)
    for path, expected in gradients_of(model, base, tmp_path).items():
        assert cases.largest_difference(tree.flatten(gradients)[path], expected) < 1e-5, path


def test_a_reward_model_is_that_of_trl(tmp_path, tmp_path_factory):
    base = folder(tmp_path_factory.getbasetemp() / "policy")
    arguments = trl.RewardConfig(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=4, report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_dropout=True, max_length=None, center_rewards_coefficient=0.05,
    )  # fmt: skip
    # With padding that is the end token, transformers would read the reward one token before the end.
    tokenizer = transformers.AutoTokenizer.from_pretrained(base, pad_token="<unk>")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0).double()
    trainer = trl.RewardTrainer(
        model=model,
        args=arguments,
        train_dataset=rows(),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    theirs = trainer.compute_loss(trainer.model, dict(batch))
    theirs.backward()

    model_of_ours, params = ours(base)
    config = dataclasses.replace(model_of_ours.config, scalar_heads=("reward",))
    model_of_ours = dataclasses.replace(model_of_ours, config=config)
    params = params | {"heads": {"reward": {"weight": jnp.asarray(model.score.weight.detach().numpy()[0])}}}
    both = {}
    for side, ids, inside in zip(
        pairs.SIDES, *(batch[name].numpy().reshape(2, 4, -1) for name in ("input_ids", "attention_mask")), strict=True
    ):
        both |= {f"{side}/inputs": jnp.asarray(ids, jnp.int32), f"{side}/segment_ids": jnp.asarray(inside, jnp.int32)}
    objective = reward.build(reward.RewardConfig(0.05), {"policy": policy(model_of_ours)}, arrays(both))

    def loss(params):
        return objective.loss(params, {"base": {}}, both, None, objective.weights(both))[0]

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    assert abs(theirs.item() - np.log(2)) > 1e-3
    assert float(value) == pytest.approx(theirs.item(), rel=1e-6)
    flat = tree.flatten(gradients)
    assert cases.largest_difference(flat["heads/reward/weight"], model.score.weight.grad.numpy()[0]) < 1e-5
    expected = model.model.norm.weight.grad.numpy()
    assert cases.largest_difference(flat["final_norm/scale"], expected) < 1e-5
    expected = model.model.embed_tokens.weight.grad.numpy()
    assert cases.largest_difference(flat["embed/tokens"][: len(expected)], expected) < 1e-5
