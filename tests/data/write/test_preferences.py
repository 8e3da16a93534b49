"""Pairs in the forms in which people have them become the same rows: prompt and answers, dialogues, conversations."""

import json

import numpy as np
import pytest

from t5x_like.core.errors import UsageError, UserError
from t5x_like.data.templates import chat
from t5x_like.data.templates.chat import Chat
from tests.data import chats, corpus

USER = {"role": "user", "content": "Which sea?"}
GOOD, WORSE = ({"role": "assistant", "content": text} for text in ("The Baltic.", "No idea"))
FIELDS = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
WHOLE = FIELDS | {"prompt": ""}


def opened(tmp_path, records, name="pairs", **given):
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    shape = {"features": "pairs", "packing": "single", "length": 64, "batch_size": len(records)}
    config = corpus.config(source=f"jsonl:{tmp_path}/{name}.jsonl", **shape | given)
    return corpus.opened(config, tmp_path / f"cache-{name}")


def rows(data):
    """The arrays of all pairs, in the order of the file."""
    batch, places = data.rows(0, np.arange(len(data.documents(0)))), data.documents(0)
    order = np.argsort([place.offset for place in places])
    return {name: array[order] for name, array in batch.items()}


def test_whole_dialogues_are_divided_at_the_last_turn_of_the_assistant(tmp_path):
    prompts = ["\n\nHuman: a?\n\nAssistant:", "\n\nHuman: a?\n\nAssistant: b\n\nHuman: c\n\nAssistant:"]
    answers = [(" yes", " yes, no"), (" d", "")]
    whole = [{"chosen": p + a, "rejected": p + b} for p, (a, b) in zip(prompts, answers, strict=True)]
    apart = [{"prompt": p, "chosen": a, "rejected": b} for p, (a, b) in zip(prompts, answers, strict=True)]
    found = rows(opened(tmp_path, whole, "whole", fields=WHOLE))
    expected = rows(opened(tmp_path, apart, "apart", fields=FIELDS))
    assert set(found) == set(expected) and found["chosen/loss_weights"].sum() == len(" yes") + len(" d") + 2
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


FORMS = {
    "messages": (FIELDS, {"prompt": [USER], "chosen": [GOOD], "rejected": [WORSE]}),
    "texts": (FIELDS, {"prompt": "Which sea?", "chosen": "The Baltic.", "rejected": "No idea"}),
    "whole": (WHOLE, {"chosen": [USER, GOOD], "rejected": [USER, WORSE]}),
    "prompt repeated": (FIELDS, {"prompt": "Which sea?", "chosen": [USER, GOOD], "rejected": [USER, WORSE]}),
    "prompt repeated, messages": (FIELDS, {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, WORSE]}),
    "lists as JSON": (
        FIELDS,
        {name: json.dumps([m]) for name, m in zip(("prompt", "chosen", "rejected"), (USER, GOOD, WORSE), strict=True)},
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("features", ["pairs", "pair_texts"])
def test_conversations_are_written_by_the_chat_template(tmp_path, form, features):
    fields, record = FORMS[form]
    tokenizer = str(chats.folder(tmp_path / "tokenizer"))
    settings = {"template": "chatml", "train_on": "last", "system": ""}
    data = opened(tmp_path, [record], tokenizer=tokenizer, fields=fields, chat=settings, features=features)
    text = chat.source("chatml", data.vocabulary, system="", where="")
    written = Chat(text, data.vocabulary, where="")
    found = rows(data)
    for side, answer in (("chosen", GOOD), ("rejected", WORSE)):
        ((source, target),) = written.turns([USER, answer], last=True)
        before, after = (data.vocabulary.encode_parts(parts)[0] for parts in (source, target))
        whole = [*before, *after]
        if features == "pair_texts":
            assert found[f"{side}/inputs"][0][: len(whole)].tolist() == whole
            assert found[f"{side}/segment_ids"][0].sum() == len(whole)
        else:
            assert found[f"{side}/inputs"][0][: len(whole) - 1].tolist() == whole[:-1]
            weights = found[f"{side}/loss_weights"][0]
            assert weights.sum() == len(after) and weights[len(before) - 1 : len(whole) - 1].all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("features", ["pairs", "pair_texts"])
def test_the_template_of_t5_writes_the_source_and_both_answers(tmp_path, form, features):
    """As it writes examples for instruction tuning."""
    fields, record = FORMS[form]
    settings = {"template": "t5", "train_on": "last", "system": "Be brief."}
    given = {"fields": fields, "chat": settings, "features": features, "encoder_length": 48}
    data = opened(tmp_path, [record], **given)
    found, (encode, eos) = rows(data), (data.vocabulary.encode, data.vocabulary.eos_id)
    source = [*encode("Be brief.\nWhich sea?\n"), eos]
    assert found["encoder_inputs"][0][: len(source)].tolist() == source
    assert found["encoder_segment_ids"][0].sum() == len(source)
    for side, answer in (("chosen", GOOD), ("rejected", WORSE)):
        target = [*encode(answer["content"]), eos]
        expected = [0, *target] if features == "pair_texts" else [0, *target[:-1]]
        assert found[f"{side}/inputs"][0][: len(expected)].tolist() == expected
        assert found[f"{side}/segment_ids"][0].sum() == len(expected)


def test_whole_dialogues_of_an_encoder_decoder_are_divided_alike(tmp_path):
    prompt = "\n\nHuman: a?\n\nAssistant:"
    record = {"chosen": f"{prompt} yes", "rejected": f"{prompt} no"}
    found = rows(opened(tmp_path, [record], fields=WHOLE, encoder_length=48))
    assert found["encoder_segment_ids"][0].sum() == len(prompt) + 1
    assert [found[f"{side}/loss_weights"][0].sum() for side in ("chosen", "rejected")] == [5, 4]


BAD = {
    "other prompts": (WHOLE, {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"}),
    "no dialogue": (WHOLE, {"chosen": "a", "rejected": "b"}),
    "other messages": (WHOLE, {"chosen": [USER, GOOD], "rejected": [USER | {"content": "?"}, WORSE]}),
    "no assistant": (FIELDS, {"prompt": [USER], "chosen": [USER], "rejected": [WORSE]}),
    "no prompt": (WHOLE, {"chosen": [GOOD], "rejected": [WORSE]}),
    "no list": (FIELDS, {"prompt": 7, "chosen": [GOOD], "rejected": [WORSE]}),
    "missing": (FIELDS, {"prompt": [USER], "chosen": [GOOD]}),
}
SAID = {
    "other prompts": "the prompts of a pair differ",
    "no dialogue": "the prompts of a pair differ",
    "other messages": "the prompts of a pair differ",
    "no assistant": "field 'chosen' should end with a turn of the assistant, ends with 'user'",
    "no prompt": "a pair has no prompt",
    "no list": "field 'prompt' should be a list of messages, is 7",
    "missing": "no field 'rejected' among prompt, chosen; set config.data.fields.rejected",
}


@pytest.mark.parametrize("encoder_length", [0, 32])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_pair_is_named(tmp_path, case, encoder_length):
    fields, record = BAD[case]
    text, template = isinstance(record["chosen"], str), "t5" if encoder_length else "plain"
    given = {} if text else {"chat": {"template": template, "train_on": "last", "system": ""}}
    given["encoder_length"] = encoder_length
    with pytest.raises(UserError) as caught:
        opened(tmp_path, [record], fields=fields, **given)
    assert SAID[case] in str(caught.value) and str(caught.value).startswith(f"{tmp_path}/pairs.jsonl:1 (byte 0): ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("features", ["pairs", "pair_texts"])
@pytest.mark.parametrize("encoder_length", [0, 24])
def test_a_cut_prompt_has_no_begin_token_that_the_template_did_not_write(tmp_path, features, encoder_length):
    tokenizer = str(chats.folder(tmp_path / "tokenizer"))
    record = {"prompt": "word " * 60, "chosen": "yes", "rejected": "no"}
    given = {"features": features, "tokenizer": tokenizer, "fields": FIELDS, "length": 24}
    given["encoder_length"] = encoder_length
    for template, writes in (("chatml", False), ("plain", True), ("none", True)):
        settings = {"template": template, "train_on": "assistant", "system": ""}
        data = opened(tmp_path, [record], name=template, chat=settings, **given)
        read = rows(data)["encoder_inputs" if encoder_length else "chosen/inputs"]
        assert data.vocabulary.bos_id is not None and (read[0, 0] == data.vocabulary.bos_id) == writes


def test_an_answer_that_fills_its_row_keeps_its_first_token(tmp_path):
    tokenizer = str(chats.folder(tmp_path / "tokenizer"))
    record = {"prompt": "word " * 60, "chosen": "answer " * 60, "rejected": "no " * 60}
    for features in ("pairs", "pair_texts"):
        given = {"features": features, "tokenizer": tokenizer, "fields": FIELDS, "length": 16}
        truncate = {"min_targets": 16 if features == "pair_texts" else 16, "rule": "cut", "inputs": "left"}
        data = opened(tmp_path, [record], name=features, truncate=truncate, **given)
        first = data.vocabulary.encode("answer ")[0]
        found = rows(data)["chosen/inputs"][0].tolist()
        assert first in found[:2] and (found[0] == first) == (features == "pair_texts")


def test_pairs_through_a_template_have_their_own_features(tmp_path):
    with pytest.raises(UsageError, match="features='causal'; use 'pairs' or 'pair_texts'"):
        chat_of = {"template": "plain", "train_on": "last", "system": ""}
        corpus.config(source="jsonl:a", fields=FIELDS, chat=chat_of, features="causal").check("config.data")
