"""Conversations that offer tools or call them: every kind of source refuses them by the same line.

SeqIO: test_chat_tasks.py; tfds: test_tensorflow_sources.py.
"""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest

from t5x_like.core.errors import UserError
from t5x_like.data.write import prepare
from tests.data import chats, corpus

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
CALLING = [chats.SHORT[0], CALL, {"role": "tool", "content": "4"}, chats.SHORT[1]]
CASES = {
    "offered": (
        {"messages": chats.SHORT, "tools": [TOOL]},
        "field 'tools' offers tools, which is not supported; leave such records out, or the field; mend it, or leave "
        "such records out: config.data.on_bad_record=skip",
    ),
    "called": (
        {"messages": CALLING, "tools": []},
        "a message calls a tool (tool_calls), which config.data.chat.template='plain' does not write; use "
        "config.data.chat.template='tokenizer' with a template that does, or leave such conversations out; mend it, or "
        "leave such records out: config.data.on_bad_record=skip",
    ),
}
# Where the second record stands.
PLACES = {"jsonl": r".jsonl:2 (byte ", "csv": ".csv:", "parquet": ".parquet: record 1: ", "arrow": ".arrow: record 1: "}


def write(folder, kind, records):
    path = folder / f"records.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif kind == "csv":
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(records[0])
            writer.writerows([json.dumps(value) for value in record.values()] for record in records)
    else:
        table = pyarrow.Table.from_pylist(records)
        if kind == "parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            with pyarrow.ipc.new_file(path, table.schema) as file:
                file.write_table(table)
    return f"{kind}:{path}"


def config(source, **given):
    shape = {"tokenizer": "bytes", "chat": {"template": "plain"}, "packing": "examples", "length": 256}
    return corpus.config(source=source, **shape | {"fields": {"messages": "messages"}} | given)


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("case", CASES)
def test_tools_are_refused_by_one_line_in_every_kind_of_source(tmp_path, kind, case):
    record, line = CASES[case]
    good = {"messages": chats.SHORT, "tools": []}
    source = write(tmp_path, kind, [good, record])
    with pytest.raises(UserError) as caught:
        prepare.prepare(config(source), str(tmp_path / "cache"), report=None)
    assert str(caught.value).endswith(line) and PLACES[kind] in str(caught.value)
    skipping = config(source, on_bad_record="skip", max_bad_share=0.5)
    done = prepare.prepare(skipping, str(tmp_path / "cache"), report=None)
    assert (done.bad, done.documents) == (1, 1)


@pytest.mark.parametrize("kind", PLACES)
def test_tools_of_a_pair_are_refused_too(tmp_path, kind):
    answers = {"prompt": [chats.SHORT[0]], "chosen": [chats.SHORT[1]], "rejected": [chats.SHORT[1] | {"content": "x"}]}
    given = {"fields": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}, "features": "pairs"}
    source = write(tmp_path, kind, [answers | {"tools": []}, answers | {"tools": [TOOL]}])
    with pytest.raises(UserError) as caught:
        prepare.prepare(config(source, packing="single", **given), str(tmp_path / "cache"), report=None)
    assert str(caught.value).endswith(CASES["offered"][1]) and PLACES[kind] in str(caught.value)
