"""Conversations from SeqIO: tasks of inputs and targets, tasks of messages, mixtures at SeqIO's rates and at ours."""

import dataclasses
import json

import numpy as np
import pytest

from t5x_like.core.errors import UserError
from t5x_like.data.write import prepare
from tests.data import chats, corpus

_TASKS = """
import functools
import json
import os
import seqio
import tensorflow as tf

FOLDER = os.path.dirname(__file__)
TEXT = seqio.Feature(seqio.PassThroughVocabulary(0), add_eos=False, rank=0, dtype=tf.string)
SOURCE = seqio.TextLineDataSource({"train": os.path.join(FOLDER, "lines.txt")})
CHATS = seqio.TextLineDataSource({"train": os.path.join(FOLDER, "chats.jsonl")})


def example(line):
    parts = tf.strings.split(line, "|")
    return {"inputs": parts[0], "targets": parts[1]}


seqio.TaskRegistry.add("examples", source=SOURCE, output_features={"inputs": TEXT, "targets": TEXT}, preprocessors=[
    lambda dataset: dataset.map(example)])
seqio.TaskRegistry.add("chats", source=CHATS, output_features={"messages": TEXT}, preprocessors=[
    lambda dataset: dataset.map(lambda line: {"messages": line})])
seqio.TaskRegistry.add("more", source=CHATS, output_features={"inputs": TEXT, "targets": TEXT}, preprocessors=[
    lambda dataset: dataset.map(lambda line: {"inputs": "say it", "targets": line})])
seqio.TaskRegistry.add("tools", source=CHATS, output_features={"messages": TEXT, "tools": TEXT}, preprocessors=[
    lambda dataset: dataset.map(lambda line: {"messages": line, "tools": '[{"name": "add"}]'})])
seqio.TaskRegistry.add("calls", source=CHATS, output_features={"messages": TEXT, "tools": TEXT}, preprocessors=[
    lambda dataset: dataset.map(lambda line: {"messages": json.dumps([
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [{"function": {}}]}]),
        "tools": "[]"})])
seqio.TaskRegistry.add("either", source=CHATS, output_features={"messages": TEXT, "inputs": TEXT, "targets": TEXT},
    preprocessors=[lambda dataset: dataset.map(lambda line: {"messages": "", "inputs": "say it", "targets": line})])
seqio.MixtureRegistry.add("both", [("examples", 3.0), ("more", 1.0)])
"""
EXAMPLES = [(f"question {number}", f"answer {number}") for number in range(6)]
FIELDS = {"inputs": "inputs", "targets": "targets"}


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    root = tmp_path_factory.mktemp("tasks")
    (root / "lines.txt").write_text("".join(f"{question}|{answer}\n" for question, answer in EXAMPLES))
    lines = [f"{json.dumps(each)}\n" for each in (*chats.CONVERSATIONS, chats.SHORT[:1])]
    (root / "chats.jsonl").write_text("".join(lines))
    (root / "tasks.py").write_text(_TASKS)
    return root / "tasks.py"


def config(module, task, **overrides):
    given = {"source": f"seqio:{module}:{task}", "chat": {"template": "plain"}, "fields": FIELDS}
    return corpus.config(**given | {"packing": "examples", "length": 256, "batch_size": 4} | overrides)


def trained(data, name="train"):
    """What is trained of a component, row by row."""
    reader = next(component.reader for component in data._components if component.name == name)
    batch = reader.batch(np.arange(reader.size.rows), None)
    rows = zip(batch["targets"], batch["loss_weights"], strict=True)
    return [data.vocabulary.decode_bytes(row[weights > 0].tolist()).decode() for row, weights in rows]


def test_tasks_of_a_mixture_are_conversations_at_its_rates(module, tmp_path):
    data = corpus.opened(config(module, "both", packing="concatenate", length=2000), tmp_path)
    assert trained(data, "examples") == ["".join(answer for _, answer in EXAMPLES)]
    reader = data._components[0].reader
    written = data.vocabulary.decode_bytes(reader.batch(np.arange(1), None)["inputs"][0, :30].tolist()).decode()
    assert written == "User:\nquestion 0\n\nAssistant:\nan"[:30]
    # SeqIO's rates are of examples: rows of more examples each are drawn less often.
    facts = data.describe()["components"]
    drawn = {name: f["share_of_rows"] * f["documents"] / f["rows"] for name, f in facts.items()}
    assert drawn["examples"] / drawn["more"] == pytest.approx(3.0)


def test_a_feature_of_messages_is_read_and_a_bad_one_named(module, tmp_path):
    given = {"fields": {"messages": "messages"}}
    skipping = config(module, "chats", **given, on_bad_record="skip", max_bad_share=0.3)
    done = prepare.prepare(skipping, str(tmp_path), report=None)
    assert done.bad == 1 and "#chats-0: example 3: the conversation of field 'messages' has no" in done.bad_places[0]
    direct = config(module, "", **given, source=chats.write(tmp_path / "direct.jsonl", chats.CONVERSATIONS))
    one, two = (corpus.opened(each, tmp_path) for each in (skipping, direct))
    assert trained(one) == trained(two)
    with pytest.raises(UserError, match="1 of 4 records are bad, which is more than config.data.max_bad_share=0.2"):
        prepare.prepare(dataclasses.replace(skipping, max_bad_share=0.2), str(tmp_path), report=None)


@pytest.mark.parametrize("shape", ["decoder", "encoder and decoder"])
def test_tasks_of_both_kinds_are_sources_of_one_mixture(module, tmp_path, shape):
    """An example that has an empty feature of messages is one of inputs and targets."""
    given = {"packing": "concatenate", "length": 2000}
    if shape != "decoder":
        given |= {"packing": "single", "features": "source_target", "encoder_length": 256, "chat": {"template": "t5"}}
    sources = {name: f"seqio:{module}:{name}" for name in ("examples", "either")}
    sources["talks"] = chats.write(tmp_path / "direct.jsonl", chats.CONVERSATIONS)
    fields = FIELDS | {"messages": "messages"}
    data = corpus.opened(config(module, "", source="", mixture={"sources": sources}, fields=fields, **given), tmp_path)
    told = [m["content"] for each in chats.CONVERSATIONS for m in each if m["role"] == "assistant"]
    lines = (module.parent / "chats.jsonl").read_text().splitlines()
    expected = {"examples": [answer for _, answer in EXAMPLES], "either": lines, "talks": told}
    for name, answers in expected.items():
        found = trained(data, name)
        assert found == ["".join(answers)] if shape == "decoder" else sorted(found) == sorted(answers)


def test_tools_of_a_task_are_refused_as_those_of_a_file(module, tmp_path):
    given = {"fields": {"messages": "messages"}}
    with pytest.raises(UserError, match=r"#tools-0: example 0: field 'tools' offers tools, which is not"):
        prepare.prepare(config(module, "tools", **given), str(tmp_path), report=None)
    with pytest.raises(UserError, match=r"#calls-0: example 0: a message calls a tool .tool_calls., which config"):
        prepare.prepare(config(module, "calls", **given), str(tmp_path), report=None)
