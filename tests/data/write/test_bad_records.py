"""A bad record is named with its file and line, or left out and counted: of every kind of file and of problem."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from t5x_like.__main__ import main
from t5x_like.core.errors import UsageError, UserError
from t5x_like.data import token_set
from t5x_like.data.read.loader import open_data
from t5x_like.data.write import prepare, progress
from t5x_like.runs import summary
from tests.data import corpus
from tests.data.write.test_prepare import contents, documents

GOOD = [f"good {number}" for number in range(30)]
LINES = [json.dumps({"text": text}).encode() for text in GOOD]


def among(bad, before=()):
    """The bad line behind nine good ones, those of JSON unless there is a header before them."""
    good = [b"1," + text.encode() for text in GOOD] if before else LINES
    return [*before, *good[:9], bad, *good[9:]]


# (kind, lines with one bad record among 30 good ones, number of its line, problem)
CASES = {
    "null": ("jsonl", among(b'{"text": null}'), 10, "field 'text' should be a text, is null"),
    "missing": ("jsonl", among(b'{"body": "a"}'), 10, "no field 'text' among body"),
    "type": ("jsonl", among(b'{"text": ["a"]}'), 10, "should be a text, is ['a']"),
    "utf-8": ("jsonl", among(b'{"text": "\xff"}'), 10, "byte 0xff at offset 181 is not UTF-8"),
    "json": ("jsonl", among(b'{"text": "a'), 10, "the line is not JSON"),
    "object": ("jsonl", among(b'"a"'), 10, "should be a JSON object"),
    "surrogate": ("jsonl", among(b'{"text": "\\ud83d"}'), 10, "lone surrogate"),
    "line": ("lines", [*map(str.encode, GOOD[:9]), b"a \xe9", *map(str.encode, GOOD[9:])], 10, "is not UTF-8"),
    "row": ("csv", among(b"1", [b"n,text"]), 11, "the row has 1 fields, the header 2"),
    "cell": ("csv", among(b"1,\xe9", [b"n,text"]), 11, "is not UTF-8"),
}


def write(tmp_path, name, packed=False):
    kind, lines, number, problem = CASES[name]
    content = b"\n".join(lines) + b"\n"
    (tmp_path / "a").write_bytes(gzip.compress(content) if packed else content)
    return f"{kind}:{tmp_path}/a", f"{tmp_path}/a:{number} (byte ", problem


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_bad_record_is_named_or_left_out(tmp_path, name, packed):
    source, place, problem = write(tmp_path, name, packed)
    with pytest.raises(UserError) as caught:
        prepare.prepare(corpus.config(source=source), str(tmp_path / "stop"), report=None)
    assert str(caught.value).startswith(place) and problem in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).endswith("or leave such records out: config.data.on_bad_record=skip")
    skipping = corpus.config(source=source, on_bad_record="skip", max_bad_share=0.04)
    done = prepare.prepare(skipping, str(tmp_path / "skip"), report=None)
    assert documents(skipping, tmp_path / "skip") == GOOD
    assert done.bad == 1 and done.bad_places[0].startswith(place) and problem in done.bad_places[0]
    # Another rule later does not take what was left out for whole, nor write it again.
    with pytest.raises(UserError, match="on_bad_record=skip"):
        prepare.prepare(corpus.config(source=source), str(tmp_path / "skip"), report=None)
    with pytest.raises(UserError, match=r"1 of 31 records are bad, which is more than config.data.max_bad_share=0.03"):
        prepare.prepare(
            corpus.config(source=source, on_bad_record="skip", max_bad_share=0.03), str(tmp_path / "new"), report=None
        )


def test_the_share_is_that_of_the_source_not_of_what_is_held_out_of_it(tmp_path):
    lines = [json.dumps({"text": text}) for text in GOOD] + ['{"text": null}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    given = {"source": f"jsonl:{tmp_path}/a.jsonl", "validation": "0.15", "on_bad_record": "skip"}
    config = corpus.config(**given, max_bad_share=0.04)
    done = prepare.prepare(config, str(tmp_path / "cache"), report=None)
    assert done.bad == 1 and 1 <= len(documents(config, tmp_path / "cache", "validation")) < 6
    with pytest.raises(UserError, match="1 of 31 records are bad"):
        prepare.prepare(corpus.config(**given, max_bad_share=0.03), str(tmp_path / "cache"), report=None)


def test_a_file_of_another_encoding_is_left_out_of_texts(tmp_path):
    for name, content in (("a", b"one"), ("b", "zw\u00f6lf".encode("latin-1")), ("c", b"three")):
        (tmp_path / f"{name}.txt").write_bytes(content)
    config = corpus.config(source=f"text:{tmp_path}/*.txt", on_bad_record="skip", max_bad_share=0.4)
    done = prepare.prepare(config, str(tmp_path / "cache"), report=None)
    assert documents(config, tmp_path / "cache") == ["one", "three"]
    assert done.bad_places == (
        f"{tmp_path}/b.txt: byte 0xf6 at offset 2 is not UTF-8; convert the file (iconv -t utf-8)",
    )


@pytest.mark.parametrize("binary", [False, True])
def test_a_text_of_a_table_that_is_no_text_is_left_out(tmp_path, binary):
    texts = pyarrow.array([*[text.encode() for text in GOOD], b"bad \xff", None], pyarrow.binary())
    column = texts if binary else texts.view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    config = corpus.config(source=f"parquet:{tmp_path}/a.parquet", on_bad_record="skip", max_bad_share=0.1)
    done = prepare.prepare(config, str(tmp_path / "cache"), report=None)
    assert documents(config, tmp_path / "cache") == GOOD and done.bad == 2
    assert [place.partition("a.parquet: ")[2][:9] for place in done.bad_places] == ["record 30", "record 31"]


def test_a_time_that_python_does_not_have_is_a_bad_record(tmp_path):
    rows = [{"body": {"text": text, "time": 10**18 if index == 4 else 0}} for index, text in enumerate(GOOD)]
    schema = pyarrow.schema({"body": pyarrow.struct({"text": pyarrow.string(), "time": pyarrow.timestamp("us")})})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), tmp_path / "a")
    config = corpus.config(source=f"parquet:{tmp_path}/a", fields={"text": "body.text"})
    prepare.prepare(config, str(tmp_path / "cache"), report=None)
    assert documents(config, tmp_path / "cache") == GOOD  # nobody asked for the time
    with pytest.raises(UserError, match=r"a: record 0: field 'body.time' should be a text, is datetime"):
        config = corpus.config(source=f"parquet:{tmp_path}/a", fields={"text": "body.time"})
        prepare.prepare(config, str(tmp_path / "cache"), report=None)
    given = {"fields": {"text": "body.time"}, "on_bad_record": "skip", "max_bad_share": 1.0}
    done = prepare.prepare(corpus.config(source=f"parquet:{tmp_path}/a", **given), str(tmp_path / "cache"), report=None)
    assert done.bad_places[4] == f"{tmp_path}/a: record 4: a value cannot be read (date value out of range)"


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("no", "no field 'no' among text, doc, n, list, time; set config.data.fields.text"),
        ("doc", "field 'doc' should be a text, is {'text': 'good 0'}"),
        ("n", "field 'n' should be a text, is 0"),
        ("list", "field 'list' should be a text, is ['a']"),
        ("time", "field 'time' should be a text, is datetime.datetime("),
        ("doc.no", "no field 'doc.no' among text, doc, n, list, time"),
        ("n.no", "no field 'n.no' among text, doc, n, list, time"),
    ],
)
def test_a_wrong_column_of_a_table_is_one_line(tmp_path, kind, field, expected):
    rows = [{"text": t, "doc": {"text": t}, "n": i, "list": ["a"]} for i, t in enumerate(GOOD)]
    table = pyarrow.Table.from_pylist(rows).append_column("time", pyarrow.array([10**6] * 30, pyarrow.timestamp("us")))
    if kind == "parquet":
        pyarrow.parquet.write_table(table, tmp_path / "a")
    else:
        with pyarrow.ipc.new_stream(str(tmp_path / "a"), table.schema) as stream:
            stream.write_table(table)
    with pytest.raises(UserError) as caught:
        prepare.prepare(
            corpus.config(source=f"{kind}:{tmp_path}/a", fields={"text": field}), str(tmp_path / "c"), report=None
        )
    assert str(caught.value).startswith(f"{tmp_path}/a: record 0: {expected}") and "\n" not in str(caught.value)


def test_many_workers_leave_out_what_one_does_and_ten_places_are_named(tmp_path, monkeypatch, capsys):
    lines = [line for index, text in enumerate(corpus.paragraphs(400)) for line in (
        json.dumps({"text": text}), *(["{"] if index % 20 == 0 else []))]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(prepare, "_SMALLEST_SHARD", 2000)
    monkeypatch.setattr(prepare, "_SHARDS", 1 << 20)
    given = {"source": f"jsonl:{tmp_path}/a.jsonl", "on_bad_record": "skip", "max_bad_share": 0.1}
    done = progress.show_progress(corpus.config(**given, tokenizer="train:bpe:300"), str(tmp_path / "one"))
    log = [line for line in capsys.readouterr().err.splitlines() if "a.jsonl:" in line]
    assert done.bad == 20 and len(done.bad_places) == len(log) == 10
    numbers = [index + 1 for index, line in enumerate(lines) if line == "{"][:10]
    assert [int(line.split("a.jsonl:")[1].split()[0]) for line in log] == numbers
    monkeypatch.setattr(prepare, "_INLINE_BYTES", 0)
    config = corpus.config(**given, tokenizer="train:bpe:300")
    many = corpus.config(**given, tokenizer="train:bpe:300", workers=2)
    prepare.prepare(many, str(tmp_path / "two"), report=None)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    facts = open_data(config, cache_dir=str(tmp_path / "two"), seed=0).describe()["components"]["train"]
    assert facts["bad"] == 20 and facts["documents"] == 400
    shown = summary._data(open_data(config, cache_dir=str(tmp_path / "two"), seed=0).describe(steps=1))
    assert str(shown["train"]).endswith(", 20 bad records left out")


def test_a_wrong_field_is_found_before_all_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 1500)
    given = {"source": f"jsonl:{tmp_path}/a.jsonl", "fields": {"text": "body"}, "on_bad_record": "skip"}
    with pytest.raises(UserError, match=r"a.jsonl:1000 .*no field 'body' among text.*all 1000 first records are bad"):
        prepare.prepare(corpus.config(**given, max_bad_share=1.0), str(tmp_path / "cache"), report=None)


def test_a_good_source_is_the_same_cache_under_either_rule(tmp_path):
    source = corpus.write_jsonl(tmp_path / "a.jsonl", GOOD)
    for rule in ("stop", "skip"):
        prepare.prepare(corpus.config(source=source, on_bad_record=rule), str(tmp_path / rule), report=None)
    assert contents(tmp_path / "stop") == contents(tmp_path / "skip")
    index = token_set.read_index(next((tmp_path / "skip").glob("tokens-*")))
    assert "bad" not in index and "bad" not in index["shards"][0]


@pytest.mark.parametrize("change", [{"on_bad_record": "skp"}, {"max_bad_share": 1.5}, {"max_bad_share": -0.1}])
def test_a_rule_that_is_none_is_refused(change):
    [name] = change
    with pytest.raises(UsageError, match=f"config.data.{name}="):
        corpus.config(source="text:a", **change)


def test_prepare_and_a_start_say_how_many_records_are_left_out(tmp_path, capsys, monkeypatch):
    source, _, _ = write(tmp_path, "null")
    command = [
        "prepare",
        "--config=configs/pretrain/test.py",
        f"--workdir={tmp_path}/w",
        f"--config.data.source={source}",
    ]
    command += ["--config.data.on_bad_record=skip", "--config.data.max_bad_share=0.1", "--config.data.validation="]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert ", 1 bad records left out" in printed.out and f"{tmp_path}/a:10 (byte " in printed.err
