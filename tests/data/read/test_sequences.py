"""Pairs and labelled texts: one example a row, with the loss on answers alone."""

import json
import pathlib

import numpy as np
import pytest

from t5x_like.core.errors import UsageError, UserError
from t5x_like.data.tokenizers import behind
from tests.data import corpus

STORIES = pathlib.Path(__file__).parents[1] / "stories260K"  # it has a begin token
LENGTH = 24
PAIRS = [("Say " + "a" * number, "yes" * (number % 3), "no" * (1 + number % 2)) for number in range(9)]
PAIRS += [("", "without a prompt", "x"), ("p" * 12, "c" * 40, "r"), ("q" * 40, "c", "r")]
LABELLED = [(f"text {number}" * (1 + number % 3), number % 4) for number in range(9)] + [("long " * 9, 70_000)]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return f"jsonl:{path}"


def pairs(tmp_path, **overrides):
    source = write(tmp_path / "pairs.jsonl", [dict(zip("pcr", pair, strict=True)) for pair in PAIRS])
    fields = {"prompt": "p", "chosen": "c", "rejected": "r"}
    given = {"features": "pairs", "packing": "single", "length": LENGTH, "fields": fields, "batch_size": len(PAIRS)}
    return corpus.config(source=source, **given | overrides)


@pytest.mark.parametrize("tokenizer", ["bytes", str(STORIES)])
def test_both_answers_follow_the_prompt_and_are_all_that_is_trained(tmp_path, tokenizer):
    data = corpus.opened(pairs(tmp_path, tokenizer=tokenizer, truncate=corpus.END), tmp_path / "cache")
    encode, eos = data.vocabulary.encode, data.vocabulary.eos_id
    bos = [] if data.vocabulary.bos_id is None else [data.vocabulary.bos_id]
    assert (tokenizer == "bytes") == (bos == [])
    batch, places = data.rows(0, np.arange(len(PAIRS))), data.documents(0)
    offsets = np.cumsum([0, *(len(json.dumps(dict(zip("pcr", pair, strict=True)))) + 1 for pair in PAIRS)]).tolist()
    assert sorted(place.offset for place in places) == offsets[:-1]
    for place in places:
        prompt, *answers = PAIRS[offsets.index(place.offset)]
        for side, answer in zip(("chosen", "rejected"), answers, strict=True):
            read = {name: batch[f"{side}/{name}"][place.row] for name in ("inputs", "targets", "loss_weights")}
            prompted = [*bos, *encode(prompt)]
            ((ids, _),) = behind.encode(data.vocabulary, [prompt], [answer])
            whole = [*prompted, *ids.tolist(), eos][: LENGTH + 1]
            count = len(whole) - 1
            assert read["inputs"][:count].tolist() == whole[:-1] and read["targets"][:count].tolist() == whole[1:]
            trained = [float(index >= len(prompted)) for index in range(1, len(whole))]
            assert read["loss_weights"].tolist() == trained + [0.0] * (LENGTH - count)
            segments = batch[f"{side}/segment_ids"][place.row]
            assert segments[: len(whole)].all() and not segments[len(whole) :].any()


@pytest.mark.parametrize("tokenizer", ["bytes", str(STORIES)])
@pytest.mark.parametrize("features", ["pairs", "pair_texts"])
def test_with_an_encoder_the_prompt_is_the_source_of_both_answers(tmp_path, tokenizer, features):
    """Sources lose their begin but for BOS, answers their end; without targets the decoder reads an answer's end."""
    given = {"tokenizer": tokenizer, "features": features, "encoder_length": 20, "start_token": "7"}
    data = corpus.opened(pairs(tmp_path, **given), tmp_path / "cache")
    encode, eos = data.vocabulary.encode, data.vocabulary.eos_id
    bos = [] if data.vocabulary.bos_id is None else [data.vocabulary.bos_id]
    batch, places = data.rows(0, np.arange(len(PAIRS))), data.documents(0)
    offsets = np.cumsum([0, *(len(json.dumps(dict(zip("pcr", pair, strict=True)))) + 1 for pair in PAIRS)]).tolist()
    cut = 0
    for place in places:
        prompt, *answers = PAIRS[offsets.index(place.offset)]
        whole = [*bos, *encode(prompt), eos]
        source = whole if len(whole) <= 20 else [*bos, *whole[len(whole) - 20 + len(bos) :]]
        cut += len(whole) > 20
        for name, expected in (("inputs", source), ("segment_ids", [1] * len(source))):
            assert batch[f"encoder_{name}"][place.row].tolist() == expected + [0] * (20 - len(source))
        assert batch["encoder_positions"][place.row].tolist() == [*range(len(source)), *[0] * (20 - len(source))]
        for side, answer in zip(("chosen", "rejected"), answers, strict=True):
            read = {name.split("/")[1]: batch[name][place.row] for name in batch if name.startswith(side)}
            targets = [*encode(answer), eos]
            inputs = [7, *targets[:-1]][:LENGTH] if features == "pairs" else [7, *targets][:LENGTH]
            padding = [0] * (LENGTH - len(inputs))
            assert read["inputs"].tolist() == inputs + padding
            assert read["segment_ids"].tolist() == [1] * len(inputs) + padding
            assert read["positions"].tolist() == [*range(len(inputs)), *padding]
            if features == "pairs":
                assert read["targets"].tolist() == targets[:LENGTH] + padding
                assert read["loss_weights"].tolist() == [1] * len(inputs) + padding
    assert cut and data.describe()["components"]["train"]["truncated"] > cut


def test_pairs_that_are_too_long_are_counted(tmp_path):
    data = corpus.opened(pairs(tmp_path), tmp_path / "cache")
    assert data.describe()["components"]["train"]["truncated"] == 2


def test_pairs_are_read_as_pairs_only(tmp_path):
    with pytest.raises(UsageError, match="features='causal' reads no pairs"):
        corpus.opened(pairs(tmp_path, features="causal", packing="examples"), tmp_path / "cache")
    with pytest.raises(UsageError, match="needs two answers to each prompt"):
        corpus.opened(pairs(tmp_path, fields={"text": "c"}), tmp_path / "cache")
    with pytest.raises(UsageError, match="give chosen and rejected, and prompt unless they are whole dialogues"):
        corpus.opened(pairs(tmp_path, fields={"prompt": "p"}), tmp_path / "cache")
    with pytest.raises(UsageError, match="give inputs and targets, or prompt, chosen and rejected, or label"):
        fields = {"prompt": "p", "chosen": "c", "rejected": "r", "label": "p"}
        corpus.opened(pairs(tmp_path, fields=fields), tmp_path / "cache")


def labelled(tmp_path, records, **overrides):
    source = write(tmp_path / "labelled.jsonl", records)
    given = {"features": "labels", "packing": "single", "length": LENGTH, "fields": {"label": "class"}}
    return corpus.config(source=source, batch_size=len(records), **given | overrides)


def test_each_text_stands_in_its_row_beside_its_class(tmp_path):
    records = [{"text": text, "class": label} for text, label in LABELLED]
    data = corpus.opened(labelled(tmp_path, records), tmp_path / "cache")
    batch = data.rows(0, np.arange(len(LABELLED)))
    found = sorted(
        (data.vocabulary.decode(tokens[segments > 0]), int(label))
        for tokens, segments, label in zip(batch["inputs"], batch["segment_ids"], batch["labels"], strict=True)
    )
    assert found == sorted((text[:LENGTH], label) for text, label in LABELLED)
    assert data.describe()["components"]["train"]["truncated"] == sum(len(text) + 1 > LENGTH for text, _ in LABELLED)


@pytest.mark.parametrize("label", ["red", -1, 1.5, True, None])
def test_what_is_no_class_is_named_with_its_record(tmp_path, label):
    records = [{"text": "fine", "class": 0}, {"text": "wrong", "class": label}]
    with pytest.raises(UserError, match=r"labelled\.jsonl:2 \(byte \d+\): field 'class' should be a class"):
        corpus.opened(labelled(tmp_path, records), tmp_path / "cache")


def test_texts_without_classes_are_not_labelled(tmp_path):
    records = [{"text": "fine", "class": "3"}]
    assert corpus.opened(labelled(tmp_path, records), tmp_path / "cache").rows(0, np.array([0]))["labels"] == [3]
    with pytest.raises(UsageError, match="needs a class of each text; set config.data.fields.label"):
        corpus.opened(labelled(tmp_path, records, fields={"label": ""}), tmp_path / "cache")
