"""DPO and reward models of a T5 beside TRL's trainers, whose models are decoders: a torch T5 that stands in for one.

It takes the tokens of prompt and answer as one row, gives the prompt to its encoder and the answer to its decoder, and
returns what TRL computes its losses from. Loss and gradient of every parameter are then compared.
"""

import dataclasses
import functools
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
import trl

from t5x_like.core import tree
from t5x_like.objectives import dpo, pairs, reward
from t5x_like.objectives.interface import frozen_role, policy
from tests.models import cases
from tests.objectives.test_preferences_trl import STORIES, arrays, ours, rows

END, WIDTHS = 2, (16, 32)  # EOS of this tokenizer; tokens of a source and of an answer


@functools.cache
def folder(base, seed):
    """A T5 with the tokenizer of the stories."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 512, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=END)
    transformers.T5ForConditionalGeneration(config).save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(STORIES / name, base)
    return str(base)


def loaded(base):
    return transformers.T5ForConditionalGeneration.from_pretrained(base).double()


def divided(ids, inside, answer):
    """One row of TRL as (source with EOS, answer), lists of tokens."""
    return [*ids[inside & ~answer].tolist(), END], ids[inside & answer].tolist()


def padded(rows, width):
    return np.array([[*row, *[0] * (width - len(row))] for row in rows])


def run(model, sources, answers, *, head=False):
    """The decoder's last hidden states for (source, answer) of each row, padded; answers stand behind the start."""
    given = {
        "input_ids": torch.tensor(padded(sources, WIDTHS[0])),
        "attention_mask": torch.tensor(padded([[1] * len(row) for row in sources], WIDTHS[0])),
        "decoder_input_ids": torch.tensor(padded([[0, *(row if head else row[:-1])] for row in answers], WIDTHS[1])),
    }
    return model(**given, output_hidden_states=True)


class AsDecoder(torch.nn.Module):
    """What TRL's DPO asks of a decoder."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, labels, **_):
        inside, answer = attention_mask.bool(), labels != -100
        found = [divided(*row) for row in zip(input_ids, inside, answer, strict=True)]
        logits = run(self.model, *zip(*found, strict=True)).logits
        targets = torch.tensor(padded([target for _, target in found], WIDTHS[1]))
        logp = torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]
        placed = torch.zeros(*input_ids.shape, dtype=logp.dtype)
        placed = placed.masked_scatter(
            answer, torch.cat([row[: len(t)] for row, (_, t) in zip(logp, found, strict=True)])
        )
        rest = {name: torch.zeros_like(placed[:, 1:]) for name in ("entropy", "entropies", "mean_logits")}
        return types.SimpleNamespace(log_probs=placed[:, 1:], is_top1=rest["entropy"] > 0, **rest)


class AsClassifier(torch.nn.Module):
    """What TRL's reward trainer asks of a classifier: the number of a linear head at the last token of the answer."""

    def __init__(self, model, prompts):
        super().__init__()
        self.model, self.prompts = model, prompts
        self.score = torch.nn.Linear(32, 1, bias=False, dtype=torch.float64)

    def forward(self, input_ids, attention_mask, **_):
        columns = torch.arange(input_ids.shape[1])
        answer = columns >= torch.tensor(self.prompts * 2)[:, None]
        found = [divided(*row) for row in zip(input_ids, attention_mask.bool(), answer, strict=True)]
        hidden = run(self.model, *zip(*found, strict=True), head=True).decoder_hidden_states[-1]
        last = torch.tensor([len(target) for _, target in found])
        return types.SimpleNamespace(logits=self.score(hidden[torch.arange(len(found)), last]))


def gradients_of(model, base, place):
    """The gradients of a torch T5 as our tree: written as if they were its weights, and read by the converter."""
    shutil.copytree(base, place)
    grown = loaded(base)
    with torch.no_grad():
        for mine, theirs in zip(grown.parameters(), model.parameters(), strict=True):
            mine.copy_(torch.zeros_like(mine) if theirs.grad is None else theirs.grad)
    grown.float().save_pretrained(place)
    return tree.flatten(ours(place)[1])


def batch_of(found, *, targets):
    """Our batch of pairs, of [(source, answer)] with all chosen answers first."""
    half = len(found) // 2
    sources = [source for source, _ in found[:half]]
    assert sources == [source for source, _ in found[half:]]
    batch = {
        "encoder_inputs": padded(sources, WIDTHS[0]),
        "encoder_segment_ids": padded([[1] * len(row) for row in sources], WIDTHS[0]),
    }
    for side, part in zip(pairs.SIDES, (found[:half], found[half:]), strict=True):
        answers = [target for _, target in part]
        read = [[0, *(row[:-1] if targets else row)] for row in answers]
        inside = padded([[1] * len(row) for row in read], WIDTHS[1])
        batch |= {f"{side}/inputs": padded(read, WIDTHS[1]), f"{side}/segment_ids": inside}
        if targets:
            batch |= {f"{side}/targets": padded(answers, WIDTHS[1]), f"{side}/loss_weights": inside * np.float32(1)}
    return {name: jnp.asarray(x, jnp.float32 if x.dtype.kind == "f" else jnp.int32) for name, x in batch.items()}


def options(tmp_path):
    return {
        "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "disable_dropout": True, "max_length": None,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["sigmoid", "sigmoid_norm"])
def test_dpo_of_a_t5_is_that_of_trl(kind, tmp_path, tmp_path_factory):
    base, other = (folder(tmp_path_factory.getbasetemp() / f"t5-{seed}", seed) for seed in (0, 1))
    trainer = trl.DPOTrainer(
        model=transformers.LlamaForCausalLM.from_pretrained(STORIES),  # both for the trainer's own use
        ref_model=transformers.LlamaForCausalLM.from_pretrained(STORIES),
        args=trl.DPOConfig(**options(tmp_path), loss_type=[kind], beta=0.3),
        train_dataset=rows(),
        processing_class=transformers.AutoTokenizer.from_pretrained(STORIES),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trained = loaded(base)
    trainer.ref_model = AsDecoder(loaded(other))
    trainer.model.train()
    theirs = trainer.compute_loss(AsDecoder(trained), dict(batch))
    theirs.backward()

    model, params = ours(base)
    taken = (batch[name].numpy() for name in ("input_ids", "attention_mask", "completion_mask"))
    found = [divided(ids, inside > 0, answer > 0) for ids, inside, answer in zip(*taken, strict=True)]
    both = batch_of(found, targets=True)
    config = dpo.DpoConfig(0.3, 0.0, length_normalized=kind == "sigmoid_norm", reference="role")
    roles = {"policy": policy(model), "reference": frozen_role(model, "reference")}
    objective = dpo.build(config, roles, arrays(both))
    frozen = {"base": {}, "reference": ours(other)[1]}

    def loss(params):
        return objective.loss(params, frozen, both, None, objective.weights(both))[0]

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    assert abs(theirs.item() - np.log(2)) > 1e-3
    assert float(value) == pytest.approx(theirs.item(), rel=1e-6)
    for path, expected in gradients_of(trained, base, tmp_path / "gradients").items():
        assert cases.largest_difference(tree.flatten(gradients)[path], expected) < 1e-5, path


def test_a_reward_model_of_a_t5_is_that_of_trl(tmp_path, tmp_path_factory):
    base = folder(tmp_path_factory.getbasetemp() / "t5-0", 0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(STORIES, pad_token="<unk>")
    classifier = transformers.AutoModelForSequenceClassification
    trainer = trl.RewardTrainer(
        model=classifier.from_pretrained(STORIES, num_labels=1, pad_token_id=0),  # for the trainer's own use
        args=trl.RewardConfig(**options(tmp_path), center_rewards_coefficient=0.05),
        train_dataset=rows(),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    ids, inside = (batch[name].numpy() for name in ("input_ids", "attention_mask"))
    # A batch of this trainer does not say where answers begin: where the two texts of a pair first differ.
    half = len(ids) // 2
    prompts = [int((one != other).argmax()) for one, other in zip(ids[:half], ids[half:], strict=True)]
    trained = AsClassifier(loaded(base), prompts)
    trainer.model.train()
    theirs = trainer.compute_loss(trained, dict(batch))
    theirs.backward()

    model, params = ours(base)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, scalar_heads=("reward",)))
    params = params | {"heads": {"reward": {"weight": jnp.asarray(trained.score.weight.detach().numpy()[0])}}}
    answer = np.arange(ids.shape[1]) >= np.array(prompts * 2)[:, None]
    both = batch_of([divided(*row) for row in zip(ids, inside > 0, answer, strict=True)], targets=False)
    objective = reward.build(reward.RewardConfig(0.05), {"policy": policy(model)}, arrays(both))

    def loss(params):
        return objective.loss(params, {"base": {}}, both, None, objective.weights(both))[0]

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    assert abs(theirs.item() - np.log(2)) > 1e-3
    assert float(value) == pytest.approx(theirs.item(), rel=1e-6)
    flat = tree.flatten(gradients)
    expected = {"heads/reward/weight": trained.score.weight.grad.numpy()[0]}
    expected |= gradients_of(trained.model, base, tmp_path / "gradients")
    for path, gradient in expected.items():
        if np.any(gradient):  # the LM head learns nothing
            assert cases.largest_difference(flat[path], gradient) < 1e-5, path
    assert sum(np.any(gradient) for gradient in expected.values()) > 20
