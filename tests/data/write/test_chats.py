"""Conversations from files to batches: what is trained, how turns become examples, what is cut, what is refused."""

import csv
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from t5x_like.core.errors import UsageError, UserError
from t5x_like.data import cache, token_set
from t5x_like.data.templates import named
from t5x_like.data.templates.sandbox import TemplateRefused
from t5x_like.data.write import prepare
from tests.data import chats, corpus

CHATML = {"template": "chatml"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("chats")
    chats.folder(root / "tokenizer")
    return root


def config(world, conversations=chats.CONVERSATIONS, *, source="", **overrides):
    if not source:
        name = f"{abs(hash(json.dumps(conversations)))}.jsonl"
        source = chats.write(world / name, conversations)
    given = {"tokenizer": str(world / "tokenizer"), "fields": {"messages": "messages"}, "chat": CHATML}
    given |= {"packing": "examples", "length": 256}
    return corpus.config(source=source, **given | overrides)


def opened(world, *args, **overrides):
    return corpus.opened(config(world, *args, **overrides), world / "cache")


def rows(data):
    """All rows of the first epoch."""
    count = data.describe()["components"]["train"]["rows"]
    batches = [data.rows(step, np.arange(data.batch_size)) for step in range(-(-count // data.batch_size))]
    return {name: np.concatenate([batch[name] for batch in batches])[:count] for name in batches[0]}


def said(batch, row, segment):
    """(ids of a segment, whether each is trained); what the last token predicts belongs to no conversation."""
    inside = np.flatnonzero(batch["segment_ids"][row] == segment)
    weights = batch["loss_weights"][row, inside] > 0
    assert not weights[-1]
    return batch["inputs"][row, inside].tolist(), [False, *weights[:-1].tolist()]


def spelled(data, ids):
    names = {token: name for name, token in data.vocabulary.specials.items()}
    return b"".join(names[i].encode() if i in names else data.vocabulary.decode_bytes([i]) for i in ids).decode()


def expected(conversation):
    """(text, what is trained of it) in ChatML, by hand."""
    text, trained = "", []
    for message in conversation:
        text += f"<|im_start|>{message['role']}\n"
        if message["role"] == "assistant":
            trained.append(message["content"] + "<|im_end|>")
        text += message["content"] + "<|im_end|>\n"
    return text, trained


@pytest.mark.parametrize("train_on", ["assistant", "last"])
def test_rows_hold_whole_conversations_and_train_the_assistants_words(world, train_on):
    data = opened(world, chat={"template": "chatml", "train_on": train_on})
    batch, found = rows(data), []
    for row in range(len(batch["inputs"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            ids, trained = said(batch, row, segment)
            inside = np.flatnonzero(batch["segment_ids"][row] == segment)
            assert batch["positions"][row, inside].tolist() == list(range(len(inside)))
            kept = [token for token, marked in zip(ids, trained, strict=True) if marked]
            found.append((spelled(data, ids).rstrip("\n"), spelled(data, kept)))
    wanted = [expected(conversation) for conversation in chats.CONVERSATIONS]
    chosen = [(text[:-1], "".join(parts if train_on == "assistant" else parts[-1:])) for text, parts in wanted]
    assert sorted(text for text, _ in found) == sorted(text for text, _ in chosen)
    assert sorted(parts for _, parts in found) == sorted(parts for _, parts in chosen)
    assert batch["segment_ids"].max() > 1  # several conversations in a row
    trained_bytes = sum(len(parts.replace("<|im_end|>", "").encode()) for _, parts in found)
    assert batch["target_bytes"].sum() == trained_bytes


@pytest.mark.parametrize("packing", ["concatenate", "single"])
def test_other_packings_train_the_same_tokens(world, packing):
    if packing == "single":
        given = {"features": "source_target", "encoder_length": 256, "chat": {"template": "plain"}}
        data = opened(world, packing=packing, **given)
        assert data.describe()["components"]["train"]["documents"] == 6  # turns of the assistant
        return
    data, whole = opened(world, packing=packing, length=64), opened(world)
    assert rows(data)["loss_weights"].sum() == rows(whole)["loss_weights"].sum() >= 50


def sources_and_targets(data):
    batch, found = rows(data), []
    for row in range(len(batch["inputs"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            source = batch["encoder_inputs"][row][batch["encoder_segment_ids"][row] == segment]
            inside = batch["segment_ids"][row] == segment
            assert batch["loss_weights"][row][inside].all()
            found.append((spelled(data, source.tolist()), spelled(data, batch["targets"][row][inside].tolist())))
    return sorted(found)


def test_for_an_encoder_decoder_every_turn_is_an_example(world):
    given = {"features": "source_target", "encoder_length": 128, "tokenizer": "bytes"}
    data = opened(world, [chats.SHORT, chats.LONG], chat={"template": "t5"}, **given)
    system, first, answer, second, last = (message["content"] for message in chats.LONG)
    wanted = [
        ("Hello?\n</s>", "Hi! How are you</s>"),
        (f"{system}\n{first}\n</s>", f"{answer}</s>"),
        (f"{system}\nuser: {first}\nassistant: {answer}\nuser: {second}\nassistant: </s>", f"{last}</s>"),
    ]
    assert sources_and_targets(data) == sorted(wanted)
    last = opened(world, [chats.SHORT, chats.LONG], chat={"template": "t5", "train_on": "last"}, **given)
    assert sources_and_targets(last) == sorted([wanted[0], wanted[2]])


def test_parquet_csv_and_sharegpt_give_the_same_conversations(world):
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"messages": each} for each in chats.CONVERSATIONS]), world / "a.parquet"
    )
    with open(world / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["messages"], *([json.dumps(each)] for each in chats.CONVERSATIONS)])
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    shared = [[{"from": names[m["role"]], "value": m["content"]} for m in each] for each in chats.CONVERSATIONS]
    sources = [f"parquet:{world}/a.parquet", f"csv:{world}/a.csv", chats.write(world / "shared.jsonl", shared)]
    first = rows(opened(world))
    for source in sources:
        again = rows(opened(world, source=source))
        assert all(np.array_equal(first[name], again[name]) for name in first), source


def test_examples_become_conversations_of_one_question(world):
    (world / "examples.jsonl").write_text(json.dumps({"q": "Hello?", "a": "Hi! How are you"}) + "\n")
    fields = {"messages": "", "inputs": "q", "targets": "a"}
    data = opened(world, source=f"jsonl:{world}/examples.jsonl", fields=fields, batch_size=1)
    direct = opened(world, [chats.SHORT], batch_size=1)
    for name, array in data.rows(0, np.arange(1)).items():
        assert np.array_equal(array, direct.rows(0, np.arange(1))[name]), name


def test_the_tokenizers_own_template_is_stored_with_the_data(world, tmp_path):
    chats.folder(tmp_path / "tokenizer", named.TEMPLATES["chatml"])
    given = {"tokenizer": str(tmp_path / "tokenizer"), "chat": {"template": "tokenizer"}}
    own = corpus.opened(config(world, **given), tmp_path / "cache")
    direct = opened(world)
    assert own.vocabulary.chat_template == direct.vocabulary.chat_template == named.TEMPLATES["chatml"]
    assert np.array_equal(rows(own)["loss_weights"], rows(direct)["loss_weights"])
    # Another template is other data; a tokenizer's own is left alone where no conversation is written.
    chats.folder(tmp_path / "tokenizer", named.TEMPLATES["chatml"].replace("\\n", " "))
    other = corpus.opened(config(world, **given), tmp_path / "cache")
    assert other.fingerprint != own.fingerprint
    plain = corpus.write_jsonl(tmp_path / "plain.jsonl", corpus.paragraphs(4))
    text = corpus.opened(corpus.config(source=plain, tokenizer=str(tmp_path / "tokenizer")), tmp_path / "text")
    assert not text.vocabulary.chat_template and not list(tmp_path.glob("text/*/chat_template.jinja"))


def test_caches_without_conversations_have_the_keys_that_they_had(world):
    assert cache.key(corpus.config(source="text:a")) == "cc25f23182968d0c"
    fields = {"inputs": "q", "targets": "a"}
    assert cache.key(corpus.config(source="jsonl:a", fields=fields)) != cache.key(
        corpus.config(source="jsonl:a", fields=fields, chat={"template": "plain"})
    )
    done = prepare.prepare(config(world), str(world / "cache"), report=None)
    index = token_set.read_index(world / "cache" / done.manifest.train["train"].folder)
    assert (index["version"], index["columns"]) == (3, ["trained"])


def test_a_conversation_longer_than_its_row_keeps_words_of_the_assistant_and_is_counted(world):
    long = [{"role": "user", "content": "word " * 60}, {"role": "assistant", "content": "answer " * 60}]
    data = opened(world, [long, chats.SHORT], length=40, batch_size=2)
    facts = data.describe()["components"]["train"]
    assert facts["cut"] == "1 examples do not fit a row: 1 lose tokens of their inputs, 1 of their targets"
    batch = rows(data)
    assert (batch["loss_weights"].sum(axis=1) >= 11).all()
    # ChatML writes no begin token, and cutting puts none there.
    assert not np.isin(batch["inputs"], [data.vocabulary.bos_id]).any() and data.vocabulary.bos_id is not None
    dropped = opened(world, [long, chats.SHORT], length=40, truncate={"rule": "drop"}, batch_size=1)
    assert dropped.describe()["components"]["train"]["cut"] == "1 examples do not fit a row and are left out"


# What a record holds -> a part of the line.
BAD = {
    "not a list": ("hello", "field 'messages' should be a list of messages, is the text 'hello'"),
    "a number": (7, "field 'messages' should be a list of messages, is 7"),
    "nothing": (None, "field 'messages' should be a list of messages, is null"),
    "no message": ([], "field 'messages' should be a list of messages, is []"),
    "no mapping": (["hi"], "message 1 of field 'messages' should be {role, content}, is 'hi'"),
    "an unknown role": (
        [chats.SHORT[0], {"role": "assistent", "content": ""}],
        "message 2 of field 'messages' has the role 'assistent', which is unknown; did you mean 'assistant'?",
    ),
    "no role": ([{"content": "a"}], "message 1 of field 'messages' has the role null, which is unknown; known: system"),
    "no content": ([{"role": "user"}], "message 1 of field 'messages' should have a text as its content, has null"),
    "a picture": (
        [{"role": "user", "content": [{"type": "image"}]}],
        "message 1 of field 'messages' holds other parts than texts",
    ),
    "no assistant": ([chats.SHORT[0]], "the conversation of field 'messages' has no turn of the assistant"),
    "half a pair": ([chats.SHORT[0], {"role": "assistant", "content": "\ud83d"}], "holds a lone surrogate"),
    "a reserved mark": ([{"role": "assistant", "content": "\ufdd0"}], "holds U+FDD0, which is no character"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_conversation_is_one_line_with_its_place_or_left_out(world, tmp_path, case):
    value, problem = BAD[case]
    source = chats.write(tmp_path / "a.jsonl", [chats.SHORT, value, chats.LONG])
    with pytest.raises(UserError) as caught:
        prepare.prepare(config(world, source=source), str(tmp_path / "stop"), report=None)
    assert str(caught.value).startswith(f"{tmp_path}/a.jsonl:2 (byte ") and "\n" not in str(caught.value)
    assert problem in str(caught.value) and str(caught.value).endswith("config.data.on_bad_record=skip")
    skipping = config(world, source=source, on_bad_record="skip", max_bad_share=0.5)
    done = prepare.prepare(skipping, str(tmp_path / "skip"), report=None)
    assert (done.documents, done.bad) == (2, 1)


@pytest.mark.parametrize("divided", ["shards", "held out"])
def test_the_share_of_bad_records_is_of_records_however_many_turns_become_examples(
    world, tmp_path, divided, monkeypatch
):
    talk = [{"role": role, "content": f"{role} {turn}"} for turn in range(6) for role in ("user", "assistant")]
    given = {"source": chats.write(tmp_path / "a.jsonl", [[], *[talk] * 9]), "on_bad_record": "skip"}
    given |= {"features": "source_target", "encoder_length": 256, "packing": "single"}
    if divided == "held out":
        given["validation"] = "0.5"
    else:
        monkeypatch.setattr("t5x_like.data.write.prepare._SMALLEST_SHARD", 1000)
    done = prepare.prepare(config(world, **given, max_bad_share=0.1), str(tmp_path / "cache"), report=None)
    assert (done.documents, done.bad) == (9 * 6, 1)
    parts = [*done.manifest.train.values(), *done.manifest.validation.values()]
    indexes = [token_set.read_index(tmp_path / "cache" / part.folder) for part in parts]
    assert sum(len(index["shards"]) for index in indexes) > 1  # the bad one is in one of them
    with pytest.raises(UserError, match="1 of 10 records are bad, which is more than config.data.max_bad_share=0.09"):
        prepare.prepare(config(world, **given, max_bad_share=0.09), str(tmp_path / "cache"), report=None)


def test_a_conversation_that_the_template_refuses_is_a_bad_record(world, tmp_path):
    template = named.TEMPLATES["chatml"].replace(
        "{%- for", "{%- if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{%- for", 1
    )
    chats.folder(tmp_path / "tokenizer", template)
    given = {"tokenizer": str(tmp_path / "tokenizer"), "chat": {"template": "tokenizer"}}
    with pytest.raises(UserError, match=r"jsonl:2 .*config.data.chat.template='tokenizer' does not take.*: no system;"):
        corpus.opened(config(world, **given), tmp_path / "cache")
    skipping = config(world, **given, on_bad_record="skip", max_bad_share=0.5)
    assert prepare.prepare(skipping, str(tmp_path / "cache"), report=None).bad == 1


def test_a_template_that_runs_code_is_refused_whatever_the_rule_for_bad_records(world, tmp_path):
    for template in ("{{ ().__class__.__bases__ }}", "{% include '/etc/passwd' %}", "{{ 'a' * 10**12 }}"):
        chats.folder(tmp_path / "tokenizer", template)
        given = {"tokenizer": str(tmp_path / "tokenizer"), "chat": {"template": "tokenizer"}}
        given |= {"on_bad_record": "skip", "max_bad_share": 1.0}
        with pytest.raises(TemplateRefused, match="config.data.chat.template='tokenizer' is refused: it ") as caught:
            prepare.prepare(config(world, **given), str(tmp_path / "cache"), report=None)
        assert "\n" not in str(caught.value)


CONFIGS = {
    "no template": ({"chat": {"template": "none"}}, r"fields.messages='messages' needs config.data.chat.template"),
    "no fields": ({"fields": {"messages": ""}}, "chat.template='chatml' needs config.data.fields.messages, or inputs"),
    "unknown": ({"chat": {"template": "chatlm"}}, "chat.template='chatlm' is unknown; did you mean 'chatml'"),
    "unknown turns": ({"chat": {"template": "chatml", "train_on": "all"}}, "train_on='all' should be assistant"),
    "t5 of a decoder": ({"chat": {"template": "t5"}}, "chat.template='t5' is for encoder-decoders"),
    "pairs": ({"features": "pairs", "packing": "single"}, "does not go with features='pairs'"),
    "no effect": (
        {"chat": {"template": "none", "system": "a"}, "fields": {"messages": ""}},
        "have no effect with template='none'",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_cannot_work_are_one_line(world, case):
    change, problem = CONFIGS[case]
    with pytest.raises(UsageError, match=problem):
        config(world, **change)


def test_a_tokenizer_without_the_tokens_or_the_template_is_one_line(world, tmp_path):
    with pytest.raises(UsageError, match=r"the tokenizer lacks <\|im_start\|>, <\|im_end\|>; use 'plain'"):
        corpus.opened(config(world, tokenizer="bytes"), tmp_path / "cache")
    with pytest.raises(UsageError, match="the tokenizer has no chat template; give a folder with chat_template.jinja"):
        corpus.opened(config(world, chat={"template": "tokenizer"}), tmp_path / "cache")
    with pytest.raises(UsageError, match="prompt, chosen and rejected, or label, or messages"):
        prepare.check(config(world, fields={"messages": "m", "label": "a"}))


MARKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.name }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}\n{% generation %}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
)
OWN = {"template": "tokenizer"}


def test_the_last_turn_is_all_that_the_template_marks_of_it(world, tmp_path):
    tokenizer = str(chats.folder(tmp_path / "tokenizer", MARKS))
    twice = [*chats.SHORT, chats.SHORT[0], {"role": "assistant", "content": "Again"}]
    given = {"tokenizer": tokenizer, "batch_size": 1, "length": 128}
    for conversation, words in ((chats.SHORT, "Hi! How are you<|im_end|>"), (twice, "Again<|im_end|>")):
        data = opened(world, [conversation], chat=OWN | {"train_on": "last"}, **given)
        batch = data.rows(0, np.arange(1))
        assert spelled(data, batch["targets"][0][batch["loss_weights"][0] > 0].tolist()) == words


@pytest.mark.parametrize("system", ["", "Be short."])
def test_an_assistant_may_begin_a_conversation(world, system):
    given = {"features": "source_target", "encoder_length": 128, "tokenizer": "bytes"}
    begun = [chats.SHORT[1], *chats.SHORT]
    before = f"{system}\n" if system else ""
    data = opened(world, [begun], chat={"template": "t5", "system": system}, **given)
    said = chats.SHORT[1]["content"]
    assert sources_and_targets(data)[0] == (f"{before}\n</s>", f"{said}</s>")


ODD_KEYS = {
    "surrogate in a name": {"name": "\ud83d"},
    "mark in a name": {"name": "\ufdd1"},
    "mark in a call": {"tool_calls": [{"function": {"name": "f", "arguments": "\ufdd0"}}]},
    "name of a key": {"\udc00": 1},
    "deep": {"name": json.loads("[" * 700 + "]" * 700)},
}


@pytest.mark.parametrize("case", ODD_KEYS)
def test_odd_values_of_other_keys_are_bad_records(world, tmp_path, case):
    tokenizer = str(chats.folder(tmp_path / "tokenizer", MARKS))
    record = [chats.SHORT[0], chats.SHORT[1] | ODD_KEYS[case]]
    with pytest.raises(UserError, match=r":1 \(byte 0\): .*(no character; mend the file|too deep)"):
        opened(world, [record], tokenizer=tokenizer, chat=OWN)
    kept = opened(world, [record, chats.SHORT], tokenizer=tokenizer, chat=OWN, on_bad_record="skip", max_bad_share=0.9)
    assert kept.describe()["components"]["train"]["documents"] == 1


def test_a_long_conversation_is_a_bad_record_with_its_place(world):
    long = [{"role": "user", "content": "x" * 5_000_000}, chats.SHORT[1]]
    with pytest.raises(UserError, match=r":2 \(byte \d+\): .* it is of 5000\d+ characters"):
        opened(world, [chats.SHORT, long])
    kept = opened(world, [chats.SHORT, long], on_bad_record="skip", max_bad_share=0.9)
    assert kept.describe()["components"]["train"]["documents"] == 1


def test_a_template_that_is_refused_names_the_record_at_which_it_was(world, tmp_path):
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}" + MARKS
    with pytest.raises(TemplateRefused, match=r"rounds of its loops.* \(seen at .*:1 \(byte 0\)\)"):
        opened(world, tokenizer=str(chats.folder(tmp_path / "tokenizer", endless)), chat=OWN)


def columns(world, record, **given):
    path = world / f"columns-{abs(hash(json.dumps(record)))}.jsonl"
    path.write_text(json.dumps(record) + "\n")
    return opened(world, source=f"jsonl:{path}", batch_size=1, **given)


def test_columns_beside_a_conversation_are_read_or_refused(world):
    system = {"role": "system", "content": "Be short."}
    found = rows(columns(world, {"messages": chats.SHORT, "system": "Be short.", "tools": []}))
    expected = rows(opened(world, [[system, *chats.SHORT]], batch_size=1))
    assert np.array_equal(found["inputs"], expected["inputs"])
    with pytest.raises(UserError, match="field 'tools' offers tools, which is not supported"):
        columns(world, {"messages": chats.SHORT, "tools": [{"name": "f"}]})
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    with pytest.raises(UserError, match="calls a tool .*chat.template='chatml' does not write"):
        columns(world, {"messages": [chats.SHORT[0], call, *chats.SHORT]})


def test_a_cut_source_has_no_begin_token_that_the_template_did_not_write(world):
    long = [{"role": "user", "content": "word " * 60}, chats.SHORT[1]]
    given = {"features": "source_target", "encoder_length": 24, "batch_size": 1}
    for template, writes in (("chatml", False), ("plain", True)):
        data = opened(world, [long], chat={"template": template}, **given)
        first = data.rows(0, np.arange(1))["encoder_inputs"][0, 0]
        assert data.vocabulary.bos_id is not None and (first == data.vocabulary.bos_id) == writes
