"""Every kind of file: the records in it, where they begin, any division of it, and bad content in one line."""

import csv
import json
import random

import hypothesis
import hypothesis.strategies as st
import pyarrow
import pyarrow.parquet
import pytest

from t5x_like.core.errors import UserError
from t5x_like.data.write import bad_records, sources
from tests.data import corpus

TEXTS = [text.replace("\n", " ") for text in corpus.paragraphs(30)]
BYTE_KINDS = ("text", "lines", "jsonl", "csv")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """{kind: a file of it}"""
    root = tmp_path_factory.mktemp("sources")
    files = {kind: root / f"file.{kind}" for kind in (*BYTE_KINDS, "parquet")}
    files["text"].write_text("\n".join(TEXTS))
    files["lines"].write_text("\n".join(TEXTS))  # the last line has no end
    corpus.write_jsonl(files["jsonl"], TEXTS)
    with open(files["csv"], "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerows([["text", "number"], *([text.replace("  ", "\n"), i] for i, text in enumerate(TEXTS))])
    table = pyarrow.table({"text": TEXTS, "number": list(range(len(TEXTS)))})
    pyarrow.parquet.write_table(table, files["parquet"], row_group_size=7)
    return {kind: str(file) for kind, file in files.items()}


def records(kind, path, begin, end):
    found = []
    for record in sources.read(kind, path, begin, end, name="", wanted=("text",)):
        if record.problem:
            raise UserError(f"{bad_records.place(kind, path, record.offset)}: {record.problem}")
        found.append((record.offset, record.fields["text"]))
    return found


def measure(kind, path):
    [file] = sources.files(sources.parse(f"{kind}:{path}", where="source"), where="source")
    return file.measure


@pytest.mark.parametrize("kind", ["lines", "jsonl", "csv", "parquet"])
def test_the_records_are_those_written(path, kind):
    found = [text for _, text in records(kind, path[kind], 0, measure(kind, path[kind]))]
    assert found == ([text.replace("  ", "\n") for text in TEXTS] if kind == "csv" else TEXTS)
    assert kind != "csv" or any("\n" in text for text in found)


def test_a_separator_inside_a_text_ends_no_record(path):
    inside = [text for _, text in records("jsonl", path["jsonl"], 0, 1 << 40) if "\u2028" in text and "\x85" in text]
    assert inside


@pytest.mark.parametrize("kind", BYTE_KINDS)
def test_an_offset_is_where_the_record_begins_in_the_file(path, kind):
    with open(path[kind], "rb") as file:
        content = file.read()
    for offset, text in records(kind, path[kind], 0, len(content)):
        beginning = content[offset:].decode()
        beginning = json.loads(beginning.partition("\n")[0])["text"] if kind == "jsonl" else beginning.lstrip('"')
        assert beginning.startswith(text[:5]) and (offset == 0 or content[offset - 1 : offset] == b"\n")


@pytest.mark.parametrize("kind", [*BYTE_KINDS, "parquet"])
def test_any_division_of_a_file_gives_the_same_records(path, kind):
    size = measure(kind, path[kind])
    whole = records(kind, path[kind], 0, size)

    @hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
    @hypothesis.given(st.lists(st.integers(0, size), max_size=6))
    def check(cuts):
        edges = [0, *sorted(cuts), size]
        parts = [r for begin, end in zip(edges, edges[1:], strict=False) for r in records(kind, path[kind], begin, end)]
        if kind == "text":  # a document is cut between two characters
            assert "".join(text for _, text in parts) == whole[0][1]
        else:
            assert parts == whole

    check()


def test_groups_of_pieces_cover_the_range_once_and_have_about_the_size_asked_for():
    generator = random.Random(0)
    files = [sources.SourceFile(f"{i}", size, size) for i, size in enumerate(generator.choices(range(1, 5000), k=50))]
    total = sum(file.measure for file in files)
    groups = sources.divide("jsonl", files, 1234, total - 777, 1000)
    pieces = [piece for group in groups for piece in group]
    first = [sum(file.measure for file in files[:index]) for index in range(len(files))]
    edges = [(first[p.file] + p.begin, first[p.file] + p.end) for p in pieces]
    assert edges[0][0] == 1234 and edges[-1][1] == total - 777
    assert all(left[1] == right[0] for left, right in zip(edges, edges[1:], strict=False))
    assert max(sum(p.end - p.begin for p in group) for group in groups) < 2000
    whole = sources.divide("csv", files, 0, total, 1000)  # of these a file is read whole
    assert all(piece.end - piece.begin == files[piece.file].measure for group in whole for piece in group)


def test_several_files_are_read_in_order_of_name(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    found = sources.files(sources.parse(f"text:{tmp_path}/*.txt", where=""), where="")
    assert [file.path[-5:] for file in found] == ["a.txt", "b.txt", "c.txt"]


@pytest.mark.parametrize(
    ("kind", "content", "expected"),
    [
        ("text", b"good \xff bad", "offset 5 is not UTF-8"),
        ("lines", b"one\ntwo \xc3\n", "offset 8 is not UTF-8"),
        ("jsonl", b'{"text": "a"}\n{"text": \n', r":2 \(byte 14\): the line is not JSON"),
        ("jsonl", b'["a"]\n', r":1 \(byte 0\): the line should be a JSON object"),
        ("jsonl", b'{"text": "a"}\n\xff\n', "offset 14 is not UTF-8"),
        ("jsonl", b'{"text": "a"}\n' + b"[" * 100_000, r":2 \(byte 14\): the line is not JSON"),
        ("csv", b"text,n,text\na,1,b\n", "the header names 'text' twice"),
        ("csv", b"text,n\na,1\nb\n", r":3 \(byte 11\): the row has 1 fields, the header 2"),
        ("csv", b'text,n\n"a,1\n', "not csv"),
        ("parquet", b"PAR1 no", "not a Parquet file"),
        ("text", b"", "the file is empty"),
        ("jsonl", b"", "the file is empty"),
        ("lines", None, "no such file"),
    ],
)
def test_bad_content_is_one_line_with_path_and_place(tmp_path, kind, content, expected):
    path = tmp_path / "bad"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=expected) as caught:
        records(kind, str(path), 0, measure(kind, str(path)))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_page_of_parquet_is_one_line_with_path_and_row_group(path, tmp_path):
    column = pyarrow.parquet.ParquetFile(path["parquet"]).metadata.row_group(1).column(0)
    begin = column.dictionary_page_offset or column.data_page_offset
    with open(path["parquet"], "rb") as file:
        content = bytearray(file.read())
    content[begin : begin + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(content)
    assert len(records("parquet", str(bad), 0, 7)) == 7  # the first row group is whole
    with pytest.raises(UserError, match="row group 1 cannot be read") as caught:
        records("parquet", str(bad), 0, len(TEXTS))
    assert str(bad) in str(caught.value) and "\n" not in str(caught.value)


def test_a_text_of_parquet_that_is_not_utf_8_is_one_line_with_path_and_record(tmp_path):
    texts = pyarrow.array([b"good", b"bad \xff"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "bad.parquet")
    with pytest.raises(UserError, match="record 1: a text is not UTF-8") as caught:
        records("parquet", str(tmp_path / "bad.parquet"), 0, 2)
    assert str(tmp_path / "bad.parquet") in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_a_file_of_its_kind_says_which_names_it_looked_for(tmp_path):
    (tmp_path / "a.csv").write_text("text")
    with pytest.raises(UserError, match=f"text:{tmp_path}: is a folder without a file named .*txt.*give {tmp_path}/"):
        sources.files(sources.parse(f"text:{tmp_path}", where="source"), where="source")


@pytest.mark.parametrize(
    ("text", "status", "expected"),
    [
        ("jsonls:a", 2, "kind 'jsonls': did you mean 'jsonl'"),
        ("a.txt", 2, "should be KIND:PATH"),
        ("text:", 2, "should be KIND:PATH"),
        ("seqio:module", 2, "TASK_OR_MIXTURE"),
        ("text:no/such/*.txt", 1, "no file has a name like this"),
    ],
)
def test_a_wrong_source_is_refused_with_its_place(text, status, expected):
    with pytest.raises(UserError, match=expected) as caught:
        sources.files(sources.parse(text, where="config.data.source"), where="config.data.source")
    assert "config.data.source" in str(caught.value) and caught.value.exit_status == status
