"""Sources as people have them: compressed, archived, nested, empty, listed; many workers write the bytes of one."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pathlib
import subprocess
import sys
import tarfile

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from t5x_like.core.errors import UserError
from t5x_like.data.read.loader import open_data
from t5x_like.data.write import chosen_tokenizer, prepare, sources
from t5x_like.data.write.sources import Piece, SourceFile
from t5x_like.storage import paths, patterns
from tests.data import corpus
from tests.data.write.test_prepare import contents, documents, tokens_of

TEXTS = [text.replace("\n", " ") for text in corpus.paragraphs(300)]
BOM = b"\xef\xbb\xbf"


def frames(content):
    """zstd in two frames, as a file has that was appended to."""

    def one(part):
        out = pyarrow.BufferOutputStream()
        stream = pyarrow.CompressedOutputStream(out, "zstd")
        stream.write(part)
        stream.close()
        return out.getvalue().to_pybytes()

    half = len(content) // 2
    return one(content[:half]) + one(content[half:])


COMPRESS = {
    "gz": lambda content: gzip.compress(content[:50]) + gzip.compress(content[50:]),
    "zst": frames,
    "bz2": lambda content: bz2.compress(content[:50]) + bz2.compress(content[50:]),
    "xz": lambda content: lzma.compress(content[:50]) + lzma.compress(content[50:]),
}


def plain(kind, texts=TEXTS):
    """The content of a file of this kind."""
    if kind == "csv":
        out = io.StringIO(newline="")
        csv.writer(out).writerows([("number", "text"), *enumerate(texts)])
        return out.getvalue().encode()
    if kind == "jsonl":
        return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    return "\n".join(texts).encode()


def tar(texts=TEXTS):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for index, text in enumerate(texts):
            facts = tarfile.TarInfo(f"folder/{index:04}.txt")
            facts.size = len(text.encode())
            archive.addfile(facts, io.BytesIO(text.encode()))
    return out.getvalue()


def write_arrow(folder, texts=TEXTS):
    """A folder as datasets.save_to_disk leaves it: streams of record batches, and a state that names them."""
    folder.mkdir()
    half = len(texts) // 2
    names = []
    for index, part in enumerate((texts[half:], texts[:half])):
        names.append(f"data-{1 - index:05}-of-00002.arrow")
        table = pyarrow.table({"id": list(range(len(part))), "text": part})
        with pyarrow.ipc.new_stream(str(folder / names[-1]), table.schema) as stream:
            stream.write_table(table, max_chunksize=40)
    names.reverse()
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return names


def write(root, case):
    """The source of a case: `KIND:PATH`."""
    kind, _, form = case.partition(".")
    if kind == "arrow":
        write_arrow(root / "saved")
        return f"arrow:{root}/saved"
    if kind == "parquet":
        path = root / "a.parquet"
        table = pyarrow.table({"other": [text * 3 for text in TEXTS], "text": TEXTS})
        pyarrow.parquet.write_table(table, path, row_group_size=int(form))
        return f"parquet:{path}"
    path = root / f"a.{case}"
    content = tar() if form.startswith("tar") else plain(kind)
    last = form.rpartition(".")[2]
    path.write_bytes(COMPRESS[last](content) if last in COMPRESS else content)
    return f"{kind}:{path}"


CASES = [f"{kind}.{form}" for kind in ("lines", "jsonl", "csv") for form in COMPRESS]
CASES += ["text.tar", "text.tar.gz", "parquet.1000", "parquet.20", "arrow"]


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(prepare, "_SMALLEST_SHARD", 2000)
    monkeypatch.setattr(prepare, "_SHARDS", 1 << 20)


@pytest.mark.parametrize("case", CASES)
def test_one_worker_and_several_write_the_same_bytes_and_go_on_where_one_was_killed(
    tmp_path, monkeypatch, small_shards, case
):
    config = corpus.config(source=write(tmp_path, case), validation="0.2", workers=1)
    prepare.prepare(config, str(tmp_path / "one"), report=None)
    train, held_out = (documents(config, tmp_path / "one", name) for name in ("train", "validation"))
    assert train + held_out == TEXTS and 30 < len(held_out) < 90
    shards = sorted((tmp_path / "one").rglob("shard-*.bin"))
    assert len(shards) > 4
    before = contents(tmp_path / "one")
    for lost in shards[1::3]:  # what is left is as after a kill
        lost.with_suffix(".json").unlink()
    prepare.prepare(config, str(tmp_path / "one"), report=None)
    assert contents(tmp_path / "one") == before
    monkeypatch.setattr(prepare, "_INLINE_BYTES", 0)
    prepare.prepare(corpus.config(**{**_given(config), "workers": 3}), str(tmp_path / "three"), report=None)
    assert contents(tmp_path / "three") == before


def _given(config):
    return {"source": config.source, "validation": config.validation}


@pytest.mark.parametrize("case", CASES)
def test_a_division_read_in_one_go_gives_the_records_of_each_piece(tmp_path, case):
    source = sources.parse(write(tmp_path, case), where="source")
    files = sources.files(source, where="source")

    def read(file, begin, end):
        return sources.read(source.kind, files[file].path, begin, end, name="", wanted=("text",))

    whole = [record for index, file in enumerate(files) for record in read(index, 0, file.measure)]
    assert [record.fields["text"] for record in whole] == TEXTS

    @hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
    @hypothesis.given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
    def check(shares):
        pieces = []
        for index, file in enumerate(files):
            edges = [0, *sorted(int(share * file.measure) for share in shares), file.measure]
            pieces += [Piece(index, a, b) for a, b in zip(edges, edges[1:], strict=False) if a < b]
        cursor = sources.Cursor(read, pieces)
        together = [list(cursor.records(piece)) for piece in pieces]
        assert together == [list(read(*vars(piece).values())) for piece in pieces]
        assert [record for part in together for record in part] == whole

    check()


def test_every_byte_of_a_table_is_read_about_once_whatever_its_row_groups(tmp_path, monkeypatch, small_shards):
    texts = corpus.paragraphs(900)
    for rows in (900, 50, 7):
        path = tmp_path / f"{rows}.parquet"
        table = pyarrow.table({"other": [text * 5 for text in texts], "text": texts})
        pyarrow.parquet.write_table(table, path, row_group_size=rows, compression="none", use_dictionary=False)
        asked = []
        real = pyarrow.parquet.ParquetFile.iter_batches

        def counted(self, size, *, row_groups, real=real, asked=asked, **given):
            for batch in real(self, size, row_groups=row_groups, **given):
                asked.append((batch.schema.names, batch.num_rows))
                yield batch

        monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", counted)
        config = corpus.config(source=f"parquet:{path}")
        prepare.prepare(config, str(tmp_path / f"cache-{rows}"), report=None)
        monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", real)
        assert documents(config, tmp_path / f"cache-{rows}") == texts
        assert len(list((tmp_path / f"cache-{rows}").rglob("shard-*.bin"))) > 20
        assert all(names == ["text"] for names, _ in asked)
        assert 900 <= sum(count for _, count in asked) <= 900 * 1.15


def test_a_chain_ends_where_little_is_read_twice():
    file = SourceFile("a", 1000, 1000, tuple(range(0, 1000, 10)))
    groups = [[Piece(0, begin, begin + 25)] for begin in range(0, 1000, 25)]
    chains = sources.chains([file], groups)
    assert [index for chain in chains for index in chain] == list(range(40)) and len(chains) > 10
    assert sources.chains([SourceFile("a", 1000, 1000, (0,))], groups) == [list(range(40))]
    assert sources.chains([SourceFile("a", 1000, 1000)], groups) == [[index] for index in range(40)]
    assert sources.chains([SourceFile("a", 1000, 1000, (0,))], [groups[0], groups[2]]) == [[0], [1]]


def test_a_large_row_group_takes_little_memory(tmp_path):
    """60 MB of text in one row group, beside a column of 60 MB that nobody wants."""
    text = [f"{number:07} " * 1000 for number in range(7500)]
    table = pyarrow.table({"other": [line[::-1] for line in text], "text": text})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7500, use_dictionary=False)
    del table
    code = """
import resource, sys
from t5x_like.data.write import sources
import pyarrow.parquet
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
print(sum(len(r.fields["text"]) for r in sources.read("parquet", sys.argv[1], 0, 7500, name="", wanted=("text",))))
print(peak() - before)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.parquet")], capture_output=True, text=True, check=True
    )
    size, grown = ran.stdout.split()
    assert int(size) == 7500 * 8000 and float(grown) < 60


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "arrow"])
def test_nested_and_binary_fields_are_text(tmp_path, kind):
    rows = [{"doc": {"text": text, "n": 1}, "x": 2} for text in TEXTS[:20]]
    table = pyarrow.Table.from_pylist(rows)
    if kind == "parquet":
        raw = pyarrow.StructArray.from_arrays([pyarrow.array([t.encode() for t in TEXTS[:20]])], ["text"])
        pyarrow.parquet.write_table(pyarrow.table({"doc": raw, "x": table["x"]}), tmp_path / "a")
    elif kind == "arrow":
        with pyarrow.ipc.new_file(str(tmp_path / "a"), table.schema) as file:
            file.write_table(table)
    else:
        (tmp_path / "a").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = corpus.config(source=f"{kind}:{tmp_path}/a", fields={"text": "doc.text"})
    prepare.prepare(config, str(tmp_path / "cache"), report=None)
    assert documents(config, tmp_path / "cache") == TEXTS[:20]
    with pytest.raises(UserError, match="no field 'doc.body' among doc, x; set config.data.fields.text"):
        prepare.prepare(
            corpus.config(source=f"{kind}:{tmp_path}/a", fields={"text": "doc.body"}), str(tmp_path / "c"), report=None
        )


@pytest.mark.parametrize("kind", ["text", "lines", "jsonl", "csv"])
@pytest.mark.parametrize("form", ["", "gz"])
def test_a_byte_order_mark_is_no_text(tmp_path, kind, form):
    content = BOM + plain(kind, TEXTS[:9])
    (tmp_path / "a").write_bytes(COMPRESS[form](content) if form else content)
    config = corpus.config(source=f"{kind}:{tmp_path}/a", validation="0.3")
    prepare.prepare(config, str(tmp_path / "cache"), report=None)
    train, held_out = (documents(config, tmp_path / "cache", name) for name in ("train", "validation"))
    found = ["".join(train + held_out)] if kind == "text" else train + held_out
    assert found == (["\n".join(TEXTS[:9])] if kind == "text" else TEXTS[:9])
    _, opened, _, _ = tokens_of(config, tmp_path / "cache")
    assert opened.place(0)[1] == (3 if kind != "csv" else len(BOM + b"number,text\r\n"))


def test_empty_files_are_counted_and_only_all_of_them_are_an_error(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.txt").write_text("one")
    (tmp_path / "c.txt").write_bytes(gzip.compress(b"", mtime=0))
    config = corpus.config(source=f"text:{tmp_path}/*.txt")
    done = prepare.prepare(config, str(tmp_path / "cache"), report=None)
    assert done.empty_files == 2 and documents(config, tmp_path / "cache") == ["one"]
    facts = open_data(config, cache_dir=str(tmp_path / "cache"), seed=0).describe()["components"]["train"]
    assert facts["empty_files"] == 2
    (tmp_path / "b.txt").write_bytes(b"")
    with pytest.raises(UserError, match="all 3 files are empty; config.data.source needs text"):
        prepare.prepare(config, str(tmp_path / "cache"), report=None)


@pytest.mark.parametrize(
    ("kind", "content", "expected"),
    [
        ("jsonl", b'[\n  {"text": "a"},\n  {"text": "b"}\n]\n', "begins with a JSON array.*jq -c '.\\[\\]' FILE"),
        ("jsonl", b'[{"text": "a"}, {"text": "b"}]', "begins with a JSON array.*jq"),
        ("text", b"PK\x03\x04 a zip", "is a zip archive.*unpack it"),
        ("lines", gzip.compress(b"a line\n" * 99, mtime=0)[:-9], "gzip data is damaged or cut off"),
        ("lines", frames(b"a line\n" * 99)[:-3], "zstd data is damaged or cut off"),
        ("lines", lzma.compress(b"a line\n" * 99)[:-9], "xz data is damaged or cut off"),
        ("text", tar()[:700], "not a whole tar archive"),
        ("text", "a \u00fc".encode("utf-16"), "UTF-16, not UTF-8.*iconv -f utf-16"),
        ("arrow", b"no arrow at all", "not an Arrow file or stream"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_the_path_and_a_remedy(tmp_path, kind, content, expected):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match=expected) as caught:
        prepare.prepare(corpus.config(source=f"{kind}:{tmp_path}/a"), str(tmp_path / "cache"), report=None)
    assert str(tmp_path / "a") in str(caught.value) and "\n" not in str(caught.value)


def test_a_saved_dataset_with_splits_names_them(tmp_path):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match="holds the splits train, test; give .*/SPLIT"):
        sources.files(sources.parse(f"arrow:{tmp_path}", where="s"), where="s")


def names(text):
    found = patterns.expand(text, inside=lambda folder: sorted(f"{folder}/{name}" for name in os.listdir(folder)))
    return [os.path.relpath(path) for path in found]


def test_a_path_is_a_file_a_glob_a_list_or_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    os.mkdir("d")
    for name in ("b.txt", "a.txt", "odd [1].txt", "x,y.txt", "{1,2}.txt", "d/e.txt"):
        open(name, "w").close()
    assert names("odd [1].txt") == ["odd [1].txt"] and names("x,y.txt") == ["x,y.txt"]
    assert names("{1,2}.txt") == ["{1,2}.txt"]
    assert names("b.txt,a.txt") == ["b.txt", "a.txt"] and names("{b,a}.txt") == ["b.txt", "a.txt"]
    assert names("~/a.txt") == ["a.txt"] and names(f"{tmp_path}/?.txt") == ["a.txt", "b.txt"]
    assert names("d") == ["d/e.txt"] and names("d,{a,b}.t*,a.txt") == ["d/e.txt", "a.txt", "b.txt"]
    for missing in ("a.txt,no.txt,b.txt", "{a,no,b}.txt"):
        with pytest.raises(UserError, match="^s=text:no.txt: no such file$"):
            sources.files(sources.parse(f"text:{missing}", where="s"), where="s")


def test_a_folder_is_its_files_of_that_kind(tmp_path):
    (tmp_path / "in" / ".hidden").mkdir(parents=True)
    for name in ("b.jsonl.gz", "in/a.jsonl", "c.csv", "in/.hidden/d.jsonl", "_SUCCESS.jsonl"):
        (tmp_path / name).write_bytes(b'{"text": "a"}\n')
    found = sources.files(sources.parse(f"jsonl:{tmp_path}", where="s"), where="s")
    assert [os.path.relpath(file.path, tmp_path) for file in found] == ["b.jsonl.gz", "in/a.jsonl"]


@pytest.mark.parametrize("case", ["text.tar.gz", "jsonl.zst", "lines.txt", "csv.csv", "parquet.20", "arrow"])
def test_sources_in_a_bucket_give_the_tokens_of_those_on_a_disk(fake_gcs, tmp_path, case):
    local = write(tmp_path, case)
    kind, _, path = local.partition(":")
    bucket = f"{fake_gcs.bucket()}/data"
    if kind == "arrow":
        paths.copy_tree(path, bucket)
        given = [f"arrow:{bucket}"]
    else:
        name = os.path.basename(path)
        paths.copy_file(path, f"{bucket}/{name}")
        given = [f"{kind}:{bucket}/{name}", f"{kind}:{bucket}/*{name[-4:]}"]
    here = prepare.prepare(corpus.config(source=local), str(tmp_path / "here"), report=None)
    for source in given:
        there = prepare.prepare(corpus.config(source=source), str(tmp_path / "there"), report=None)
        assert there.manifest.train["train"].folder == here.manifest.train["train"].folder
    assert documents(corpus.config(source=given[0]), tmp_path / "there") == TEXTS
    read = open_data(corpus.config(source=given[0]), cache_dir=str(tmp_path / "there"), seed=0)
    again = open_data(corpus.config(source=local), cache_dir=str(tmp_path / "here"), seed=0)
    assert np.array_equal(read.rows(0, np.arange(4))["inputs"], again.rows(0, np.arange(4))["inputs"])


def test_a_tokenizer_may_lie_in_a_bucket_or_below_the_home_folder(fake_gcs, tmp_path, monkeypatch):
    stories = pathlib.Path(__file__).parents[1] / "stories260K"
    bucket = f"{fake_gcs.bucket()}/model"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        paths.copy_file(str(stories / name), f"{bucket}/{name}")
        paths.copy_file(str(stories / name), str(tmp_path / "home" / "model" / name))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    source = corpus.write_jsonl(tmp_path / "a.jsonl", TEXTS[:9])
    given = [bucket, f"{bucket}/tokenizer.json", "~/model", "~/model/tokenizer.json", str(tmp_path / "home" / "model")]
    made = [prepare.prepare(corpus.config(source=source, tokenizer=g), str(tmp_path / "c"), report=None) for g in given]
    assert len({done.manifest.tokenizer for done in made}) == 1
    with pytest.raises(UserError, match=f"{bucket}/no: no such file or folder"):
        prepare.prepare(corpus.config(source=source, tokenizer=f"{bucket}/no"), str(tmp_path / "c"), report=None)
    monkeypatch.setattr(chosen_tokenizer, "_MOST_STAGED", 99)
    with pytest.raises(UserError, match="more than 99; copy what is needed"):
        prepare.prepare(corpus.config(source=source, tokenizer=bucket), str(tmp_path / "c"), report=None)


def test_what_a_bucket_lacks_is_one_line(fake_gcs):
    for path, expected in (("no.txt", "no such file"), ("*.txt", "no file has a name like this")):
        source = f"text:{fake_gcs.bucket()}/{path}"
        with pytest.raises(UserError, match=expected) as caught:
            sources.files(sources.parse(source, where="config.data.source"), where="config.data.source")
        assert f"config.data.source={source}" in str(caught.value)
