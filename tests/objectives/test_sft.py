"""Instruction tuning: losses and gradients beside TRL's SFTTrainer, and packed beside single conversations."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from t5x_like.core import tree
from t5x_like.core.types import ArraySpec
from t5x_like.layers.scoring.token_scores import token_scores
from t5x_like.models.model import Model
from t5x_like.objectives import lm
from t5x_like.objectives.interface import policy
from tests.data import chats, corpus
from tests.models import cases

datasets = pytest.importorskip("datasets")
torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
mapping = pytest.importorskip("tests.models.transformers_mapping")
CONVERSATIONS = [*chats.CONVERSATIONS, chats.LONG[1:3], [*chats.LONG, *chats.SHORT]]


@dataclasses.dataclass(frozen=True)
class Scored:
    """Of all conversations together: loss, gradients, and the losses of the trained tokens in order."""

    loss: float
    gradients: dict[str, np.ndarray]
    each: np.ndarray


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("sft")
    template = pathlib.Path(trl.__file__).parent / "chat_templates" / "llama3_training.jinja"
    chats.folder(place / "tokenizer", template.read_text())
    return place


def data(root, **overrides):
    given = {
        "tokenizer": str(root / "tokenizer"),
        "chat": {"template": "tokenizer"},
        "fields": {"messages": "messages"},
    }
    given |= {"source": chats.write(root / "a.jsonl", CONVERSATIONS), "packing": "examples", "length": 160}
    return corpus.opened(corpus.config(**given | overrides), root / "cache")


def rows(opened):
    """All rows, in the order of the cache."""
    reader = opened._components[0].reader
    return reader.batch(np.arange(reader.size.rows), None)


def scored(model: Model, params, batch) -> Scored:
    """By the objective, of a batch as it is."""
    batch = {name: jax.numpy.asarray(array) for name, array in batch.items()}
    arrays = {n: ArraySpec(array.shape, str(array.dtype), ("batch", "length")) for n, array in batch.items()}
    objective = lm.build(lm.LmConfig(0.0, 0.0), {"policy": policy(model)}, arrays)

    def loss(params):
        return objective.loss(params, {"base": {}}, batch, None, objective.weights(batch))

    (value, _), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    def logp(params):
        hidden_and_head = model.score_input(params, model.apply(params, batch))
        return token_scores(*hidden_and_head, batch["targets"], want=("logp",)).logp

    each = -np.asarray(jax.jit(logp)(params))[np.asarray(batch["loss_weights"]) > 0]
    return Scored(float(value), tree.flatten(jax.device_get(gradients)), each)


def assert_equal(one: Scored, two: Scored) -> None:
    assert one.loss == pytest.approx(two.loss, rel=1e-6)
    assert np.sort(one.each) == pytest.approx(np.sort(two.each), abs=1e-5 * float(two.each.max()))
    assert set(one.gradients) == set(two.gradients)
    for path, gradient in two.gradients.items():
        assert cases.largest_difference(one.gradients[path], gradient) <= 1e-5, path


@pytest.fixture(scope="module")
def llama(root):
    """(model, parameters, what is scored of the packed rows)"""
    opened = data(root)
    model = cases.model("llama", vocab_size=opened.vocabulary.size, max_length=160, std=0.1)
    params = cases.random_params(model)
    batch = rows(opened)
    assert batch["segment_ids"].max() > 1 and len(batch["inputs"]) < len(CONVERSATIONS)
    return model, params, scored(model, params, batch)


def trainer(root, network):
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(root / "tokenizer"))
    arguments = trl.SFTConfig(
        output_dir=str(root / "trl"),
        assistant_only_loss=True,
        max_length=None,
        per_device_train_batch_size=len(CONVERSATIONS),
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    given = datasets.Dataset.from_list([{"messages": conversation} for conversation in CONVERSATIONS])
    return trl.SFTTrainer(network, args=arguments, train_dataset=given, processing_class=tokenizer)


def theirs(network, trainer, batch) -> Scored:
    """By TRL's trainer, of one of its batches."""
    network.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    with torch.no_grad():
        each = -trainer.model(**batch, fused_lm_head=True, use_cache=False).log_probs.numpy()
    each = each[:, : batch["labels"].shape[1] - 1][batch["labels"][:, 1:] != -100]
    gradients = {name: value.grad.numpy().copy() for name, value in network.named_parameters()}
    return Scored(float(loss.detach()), gradients, each)


def test_losses_and_gradients_are_those_of_trl(root, llama):
    model, params, ours = llama
    ours = dataclasses.replace(ours, gradients=mapping.state(model.config, tree.unflatten(ours.gradients)))
    network = mapping.build(model.config, params)
    peer = trainer(root, network)
    # Its own rendering, masks and padding.
    assert_equal(ours, theirs(network, peer, next(iter(peer.get_train_dataloader()))))
    # Our packed rows, whose conversations transformers tells apart by their positions.
    batch = {name: torch.tensor(array).long() for name, array in rows(data(root)).items()}
    labels = torch.full_like(batch["inputs"], -100)
    trained = batch["loss_weights"][:, :-1] > 0
    labels[:, 1:][trained] = batch["targets"][:, :-1][trained]
    packed = {"input_ids": batch["inputs"], "position_ids": batch["positions"], "labels": labels}
    assert_equal(ours, theirs(network, peer, packed))
    assert len(ours.each) > 90
    batch = rows(data(root))
    everything = batch | {"loss_weights": (batch["segment_ids"] > 0).astype(np.float32)}
    assert abs(scored(model, params, everything).loss - ours.loss) > 1e-3  # the mask decides


def test_packed_conversations_are_scored_as_single_ones(root, llama):
    model, params, packed = llama
    batch = rows(data(root))
    single = {name: [] for name in batch}
    for row in range(len(batch["inputs"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            inside = batch["segment_ids"][row] == segment
            for name, array in batch.items():
                values = np.zeros_like(array[row])
                values[: inside.sum()] = array[row][inside]
                single[name].append(values)
    single = {name: np.stack(values) for name, values in single.items()}
    single["segment_ids"] = (single["segment_ids"] > 0).astype(np.int32)
    assert len(single["inputs"]) == len(CONVERSATIONS)
    assert_equal(scored(model, params, single), packed)


def test_packed_turns_of_an_encoder_decoder_are_scored_as_single_ones(root):
    given = {"features": "source_target", "encoder_length": 256, "length": 96}
    batches = {packing: rows(data(root, packing=packing, **given)) for packing in ("examples", "single")}
    assert len(batches["examples"]["inputs"]) < len(batches["single"]["inputs"]) == 10
    assert batches["examples"]["encoder_segment_ids"].max() > 1
    model = cases.model("t5", vocab_size=420, max_length=256, std=0.3)
    params = cases.random_params(model)
    assert_equal(*(scored(model, params, batch) for batch in batches.values()))
