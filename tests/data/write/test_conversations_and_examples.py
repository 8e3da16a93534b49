"""Sources of conversations and sources of examples in one mixture: each gives what it gives alone."""

import csv
import json
import pathlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from t5x_like.core.errors import UsageError, UserError
from t5x_like.data import cache, token_set
from t5x_like.data.write import prepare
from t5x_like.rl import prompts
from tests.data import chats, corpus

EXAMPLES = [("Sort: b a", "a b"), ("Wie h\u00e4lt\n\nsich das?", " gut \n"), ("<|im_end|>?", "yes")]
TALKS = [{"messages": talk} for talk in chats.CONVERSATIONS]
ASKED = [{"question": question, "answer": answer} for question, answer in EXAMPLES]
ALONE = {"talks": {"messages": "messages"}, "asked": {"inputs": "question", "targets": "answer"}}
BOTH = ALONE["talks"] | ALONE["asked"]
DECODER = {"features": "causal", "packing": "examples", "length": 256}
SHAPES = {
    "decoder": DECODER | {"chat": {"template": "chatml"}},
    "decoder, last turn": DECODER | {"chat": {"template": "plain", "train_on": "last"}},
    "encoder and decoder": {
        **{"features": "source_target", "packing": "examples", "length": 128, "encoder_length": 128},
        "chat": {"template": "t5", "system": "Be brief."},
    },
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("both")
    chats.folder(root / "tokenizer")
    for name, records in {"talks": TALKS, "asked": ASKED, "one": [*TALKS, *ASKED]}.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), root / f"{name}.parquet")
    with open(root / "one.csv", "w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["messages", "question", "answer"])
        writer.writerows([json.dumps(record["messages"]), "", ""] for record in TALKS)
        writer.writerows(["", *example] for example in EXAMPLES)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{name: each.get(name) for name in BOTH.values()} for each in (*TALKS, *ASKED)]),
        root / "one.parquet",
    )
    return root


def config(world, source="", sources=None, **given):
    shape = {"tokenizer": str(world / "tokenizer"), "batch_size": 2}
    return corpus.config(**shape | {"source": source, "mixture": {"sources": sources or {}}} | given)


def stored(world, given):
    """{component: all that its token set holds}, in the order of its documents."""
    prepare.prepare(given, str(world / "cache"), report=None)
    entries = cache.read_manifest(given, str(world / "cache")).train
    folders = {name: world / "cache" / entry.folder for name, entry in entries.items()}
    return {name: [path.read_bytes() for path in sorted(folder.glob("*.bin"))] for name, folder in folders.items()}


@pytest.mark.parametrize("shape", SHAPES)
def test_each_source_of_a_mixture_gives_what_it_gives_alone(world, shape):
    """Tokens, bytes, what is trained and where it comes from."""
    sources = {f"{name}_{kind}": f"{kind}:{world}/{name}.{kind}" for name in ALONE for kind in ("jsonl", "parquet")}
    mixed = stored(world, config(world, sources=sources, fields=BOTH, **SHAPES[shape]))
    for name, source in sources.items():
        alone = stored(world, config(world, source, fields=ALONE[name.partition("_")[0]], **SHAPES[shape]))
        assert mixed[name] == alone["train"]
    assert len({b"".join(content) for content in mixed.values()}) == len(sources)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_file_may_hold_both(world, shape):
    def totals(name, kind, fields):
        given = config(world, f"{kind}:{world}/{name}.{kind}", fields=fields, **SHAPES[shape])
        prepare.prepare(given, str(world / "cache"), report=None)
        entry = cache.read_manifest(given, str(world / "cache")).train["train"]
        index = token_set.read_index(pathlib.Path(world / "cache" / entry.folder))
        return [index[key] for key in ("documents", "tokens", "text_bytes")]

    talks, asked = (totals(name, "jsonl", fields) for name, fields in ALONE.items())
    assert talks != asked
    for kind in ("jsonl", "csv", "parquet"):
        assert totals("one", kind, BOTH) == [sum(pair) for pair in zip(talks, asked, strict=True)]


def trained(data, name):
    reader = next(component.reader for component in data._components if component.name == name)
    batch = reader.batch(np.arange(reader.size.rows), None)
    return data.vocabulary.decode_bytes(batch["targets"][batch["loss_weights"] > 0].tolist()).decode()


@pytest.mark.parametrize("shape", ["decoder", "encoder and decoder"])
def test_rows_of_a_mixture_train_answers_of_both_at_its_rates(world, shape):
    sources = {name: f"jsonl:{world}/{name}.jsonl" for name in ALONE}
    given = {"sources": sources, "rates": {"talks": 0.25, "asked": 0.75}}
    data = corpus.opened(config(world, fields=BOTH, **SHAPES[shape] | {"mixture": given}), world / "cache")
    facts = data.describe()["components"]  # rates are of examples, of which a row may hold several
    drawn = {name: f["share_of_rows"] * f["documents"] / f["rows"] for name, f in facts.items()}
    assert drawn["asked"] / drawn["talks"] == pytest.approx(3.0)
    said = {name: trained(data, name) for name in sources}
    assert all(answer in said["asked"] and answer not in said["talks"] for _, answer in EXAMPLES[:2])
    assert "Sort" not in said["asked"] and "Gut, danke." in said["talks"] and "Hello?" not in said["talks"]


def test_a_record_that_is_neither_is_one_line(world, tmp_path):
    (tmp_path / "other.jsonl").write_text(json.dumps({"instruction": "a", "response": "b"}) + "\n")
    given = config(world, f"jsonl:{tmp_path}/other.jsonl", fields=BOTH, **SHAPES["decoder"])
    missing = "no field 'messages' and no field 'answer' among instruction, response; set config.data.fields.messages,"
    with pytest.raises(UserError, match=rf"other.jsonl:1 \(byte 0\): {missing} inputs and targets; mend it"):
        prepare.prepare(given, str(tmp_path / "cache"), report=None)
    (tmp_path / "empty.jsonl").write_text(json.dumps({"messages": [], "question": "a", "answer": None}) + "\n")
    given = config(world, f"jsonl:{tmp_path}/empty.jsonl", fields=BOTH, **SHAPES["decoder"])
    with pytest.raises(UserError, match="field 'answer' should be a text, is null"):
        prepare.prepare(given, str(tmp_path / "cache"), report=None)


def test_both_need_a_template_and_are_no_prompts(world):
    source = f"jsonl:{world}/one.jsonl"
    with pytest.raises(UsageError, match=r"fields.messages='messages' needs config.data.chat.template"):
        config(world, source, fields=BOTH)
    given = config(world, source, fields=BOTH, **SHAPES["decoder"])
    with pytest.raises(UsageError, match="fields.messages='messages': prompts are those of examples; leave it empty"):
        prompts.read(given, source, where="config.data.source", report=print)
