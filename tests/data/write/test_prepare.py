"""`prepare` writes the same cache however it is run, goes on where it was killed, and never lets held-out text in."""

import contextlib
import csv
import dataclasses
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from t5x_like.core.errors import UserError
from t5x_like.data import cache, token_set
from t5x_like.data.open_files import open_files
from t5x_like.data.read.loader import open_data
from t5x_like.data.tokenizers import vocabularies
from t5x_like.data.write import chosen_tokenizer, parts, prepare, workers
from tests.data import corpus

_PREPARE = """
import json, sys
from t5x_like.core.config import build
from t5x_like.data.write import prepare
from t5x_like.data.config import DataConfig
prepare._SMALLEST_SHARD, prepare._SHARDS, prepare._INLINE_BYTES = 2000, 1 << 20, 0
section, folder = json.loads(sys.argv[1]), sys.argv[2]
prepare.prepare(build(DataConfig, section, path="config.data"), folder, report=None)
print(sorted(name for name in sys.modules if name.split(".")[0] in ("tensorflow", "seqio", "jax")))
"""


def child(config, folder, **options):
    """`prepare` in a process of its own, with shards of 2 kB."""
    section = json.dumps(dataclasses.asdict(config))
    return subprocess.Popen([sys.executable, "-c", _PREPARE, section, str(folder)], text=True, **options)


def contents(folder):
    """{file: content} of a cache, without times and what it remembers of sources that were not written just before."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = ("prepared-", "contents-", "files-")
    return {name: content for name, content in found.items() if not name.startswith(other)}


def tokens_of(config, folder, name="train"):
    manifest = cache.read_manifest(config, str(folder))
    entry = {**manifest.train, **manifest.validation}[name]
    opened = token_set.TokenSet(folder / entry.folder, verify=True, files=open_files())
    one = np.array([0])
    ids, counts = opened.read(one, np.array([opened.tokens]), one, one, (1, opened.tokens))
    return vocabularies.load(str(folder / manifest.tokenizer)), opened, ids[0], counts[0]


def documents(config, folder, name="train"):
    vocabulary, opened, ids, _ = tokens_of(config, folder, name)
    return [vocabulary.decode(part) for part in np.split(ids, opened.ends)[:-1]]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A jsonl source of 60 kB in two files."""
    root = tmp_path_factory.mktemp("source")
    texts = corpus.paragraphs(400)
    corpus.write_jsonl(root / "a.jsonl", texts[:250])
    corpus.write_jsonl(root / "b.jsonl", texts[250:])
    return f"jsonl:{root}/*.jsonl"


@pytest.fixture(scope="module")
def reference(source, tmp_path_factory):
    """(config, cache of it that one worker wrote undisturbed)"""
    config = corpus.config(source=source, tokenizer="train:bpe:400", validation="0.2", workers=1)
    folder = tmp_path_factory.mktemp("reference")
    with child(config, folder, stdout=subprocess.PIPE) as process:
        assert process.communicate()[0].strip() == "[]" and process.returncode == 0
    assert len(list(folder.rglob("shard-*.bin"))) > 20
    return config, folder


def test_the_cache_does_not_depend_on_the_number_of_workers(reference, tmp_path):
    config, folder = reference
    with child(dataclasses.replace(config, workers=2), tmp_path) as process:
        assert process.wait() == 0
    assert contents(tmp_path) == contents(folder)


def test_native_sources_import_no_tensorflow_and_no_jax(reference):
    """Asserted in the fixture, on the modules of the process that prepared; workers run the same code."""
    assert reference[1].is_dir()


def test_a_killed_prepare_goes_on_with_the_shards_that_are_missing(reference, tmp_path):
    config, folder = reference
    with child(dataclasses.replace(config, workers=2), tmp_path, start_new_session=True) as process:
        until = time.monotonic() + 60
        while len(list(tmp_path.rglob("shard-*.json"))) < 3 and time.monotonic() < until:
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
    for unfinished in tmp_path.rglob(".*.writing"):  # a writer within fsync dies, and lets go, when that is done
        with contextlib.suppress(FileNotFoundError), open(unfinished) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
    assert not list(tmp_path.rglob("index.json"))
    done = {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("shard-*.bin") if path.with_suffix(".json").exists()
    }
    with child(config, tmp_path) as process:
        assert process.wait() == 0
    assert len(done) >= 3 and all(path.stat().st_mtime_ns == written for path, written in done.items())
    assert contents(tmp_path) == contents(folder)  # nothing half-written is left either


def test_what_a_dying_writer_still_holds_is_removed_at_the_end(tmp_path):
    config = corpus.config(source=corpus.write_jsonl(tmp_path / "a.jsonl", corpus.paragraphs(9)))
    first = prepare.prepare(config, str(tmp_path / "cache"), report=None)
    place = tmp_path / "cache" / first.manifest.train["train"].folder
    (place / "shard-00000.json").unlink()
    left = [place / f".shard-00000.{kind}.1.writing" for kind in ("bin", "json")]
    with contextlib.ExitStack() as held:
        for path in left:
            fcntl.flock(held.enter_context(open(path, "w")), fcntl.LOCK_EX)
        again = prepare.prepare(config, str(tmp_path / "cache"), report=lambda state: held.close())
    assert again.shards_written == 1 and not any(path.exists() for path in left)


def test_every_document_ends_with_eos_and_holds_its_text(reference):
    config, folder = reference
    texts = corpus.paragraphs(400)
    train, held_out = documents(config, folder), documents(config, folder, "validation")
    assert train + held_out == texts and 60 < len(held_out) < 100
    vocabulary, opened, ids, counts = tokens_of(config, folder)
    assert (ids[opened.ends - 1] == vocabulary.eos_id).all() and (counts[opened.ends - 1] == 0).all()
    assert (ids == vocabulary.eos_id).sum() == opened.documents
    assert counts.sum() == opened.text_bytes == sum(len(text.encode()) for text in train)


def test_begin_of_text_is_written_where_the_vocabulary_has_one(source, tmp_path):
    config = corpus.config(source=source, tokenizer=str(pathlib.Path(__file__).parents[1] / "stories260K"))
    prepare.prepare(config, str(tmp_path), report=None)
    vocabulary, opened, ids, counts = tokens_of(config, tmp_path)
    begins = np.concatenate([[0], opened.ends[:-1]])
    assert vocabulary.bos_id == 1 and (ids[begins] == 1).all() and (counts[begins] == 0).all()
    assert documents(config, tmp_path) == corpus.paragraphs(400)
    assert counts.sum() == sum(len(text.encode()) for text in corpus.paragraphs(400))


def test_a_fraction_of_one_document_is_cut_between_two_characters(tmp_path):
    text = "\u00fcber\U0001f600" * 500  # 9 bytes each
    (tmp_path / "a.txt").write_text(text)
    for fraction in ("0.1", "0.11", "0.1111", "0.5"):
        config = corpus.config(source=f"text:{tmp_path}/a.txt", validation=fraction)
        prepare.prepare(config, str(tmp_path / "cache"), report=None)
        [train], [held_out] = (documents(config, tmp_path / "cache", name) for name in ("train", "validation"))
        assert train + held_out == text
        assert 0 <= len(held_out.encode()) - float(fraction) * 4500 + 3 <= 6


def test_the_last_tenth_of_tinyshakespeare_is_what_others_hold_out(tmp_path):
    config = corpus.config(source="text:configs/data/tinyshakespeare/input.txt", validation="0.1")
    found = parts.find(config, tmp_path, workers.Pool(1))
    assert (found.train["train"].end, found.validation["validation"].begin) == (
        1003854,
        1003854,
    )  # nanoGPT: int(0.9 * n)


def test_what_is_there_already_is_not_written_again(source, tmp_path):
    config = corpus.config(source=source, tokenizer="train:bpe:300")
    seen = []
    first = prepare.prepare(config, str(tmp_path), report=seen.append)
    read = sum(os.path.getsize(file) for file in first.manifest.train["train"].files)
    assert first.shards_written == 1 and first.text_bytes_written == first.text_bytes < read
    assert seen[0] == chosen_tokenizer.Training(300, read) and seen[-1] == prepare.Writing("bytes", read, read)
    again = prepare.prepare(config, str(tmp_path), report=seen.append)
    assert seen[-1] == prepare.Writing("bytes", read, read)  # nothing more was done
    assert again.shards_written == again.text_bytes_written == 0
    assert again.manifest == first.manifest and again.tokens == first.tokens
    # What decides rows but no tokens leaves the cache as it is.
    other = dataclasses.replace(config, batch_size=2, length=5, packing="examples", attend_across_documents=True)
    assert prepare.prepare(other, str(tmp_path), report=None).shards_written == 0


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer": "bytes"},
        {"validation": "0.1"},
        {"preprocessors": ("strip",)},
        {"fields": {"text": "other"}},
        "content",
    ],
)
def test_another_text_or_tokenizer_is_another_token_set(tmp_path, change):
    lines = [json.dumps({"text": f" {text}", "other": text[::-1]}) for text in corpus.paragraphs(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    given = {"source": f"jsonl:{tmp_path}/a.jsonl", "tokenizer": "train:bpe:300"}
    before = prepare.prepare(corpus.config(**given), str(tmp_path / "cache"), report=None)
    if change == "content":
        (tmp_path / "a.jsonl").write_text("\n".join(lines).replace("dog", "cat"))
        change = {}
    after = prepare.prepare(corpus.config(**given | change), str(tmp_path / "cache"), report=None)
    assert after.manifest.train["train"].folder != before.manifest.train["train"].folder
    data = open_data(corpus.config(**given | change), cache_dir=str(tmp_path / "cache"), seed=0)
    assert data.describe()["components"]["train"]["tokens"] > 0


def test_an_example_has_its_inputs_without_loss(tmp_path):
    rows = [{"question": "2 + 2 =", "answer": " 4"}, {"question": "\u00fc?", "answer": " yes"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"inputs": "question", "targets": "answer"}
    data = corpus.opened(
        corpus.config(source=f"jsonl:{tmp_path}/a.jsonl", fields=fields, packing="examples", length=32), tmp_path
    )
    batch = data.rows(0, np.arange(1))
    trained = batch["targets"][batch["loss_weights"] > 0]
    assert data.vocabulary.decode(trained) in (" 4 yes", " yes 4") and (trained == data.vocabulary.eos_id).sum() == 2
    assert batch["target_bytes"].sum() == 6


def test_documents_without_a_token_are_counted_and_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n\ntwo\n")
    config = corpus.config(source=f"lines:{tmp_path}/a.txt")
    assert prepare.prepare(config, str(tmp_path / "cache"), report=None).skipped == 2
    assert documents(config, tmp_path / "cache") == ["one", "two"]


def test_a_long_document_is_tokenized_in_parts_without_a_difference(tmp_path, monkeypatch):
    text = "\n".join(corpus.paragraphs(120)) + "\n\n\nend"
    (tmp_path / "a.txt").write_text(text)
    config = corpus.config(source=f"text:{tmp_path}/a.txt", tokenizer="train:bpe:400")
    results = []
    for number, limit in enumerate((1 << 22, 500)):
        monkeypatch.setattr("t5x_like.data.write.encoding._LONG_TEXT", limit)
        prepare.prepare(config, str(tmp_path / f"{number}"), report=None)
        results.append(tokens_of(config, tmp_path / f"{number}")[2:])
    assert all(np.array_equal(left, right) for left, right in zip(*results, strict=True))


def test_a_long_document_takes_less_than_25_bytes_of_memory_per_byte(tmp_path, monkeypatch):
    """With a token for every byte, the most that there are; 4 of its id, 4 of its count, both held twice at a time."""
    monkeypatch.setattr("t5x_like.data.write.encoding._LONG_TEXT", 1 << 14)
    (tmp_path / "a.txt").write_text("a line of a long text\n" * 50_000)
    config = corpus.config(source=f"text:{tmp_path}/a.txt")
    tracemalloc.start()
    try:
        prepare.prepare(config, str(tmp_path / "cache"), report=None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 5 < peak / os.path.getsize(tmp_path / "a.txt") < 25


def test_held_out_text_may_be_a_source_of_its_own(source, tmp_path):
    (tmp_path / "v.txt").write_text("held out")
    config = corpus.config(source=source, validation=f"text:{tmp_path}/v.txt")
    prepare.prepare(config, str(tmp_path / "cache"), report=None)
    assert documents(config, tmp_path / "cache", "validation") == ["held out"]
    assert len(documents(config, tmp_path / "cache")) == 400


@pytest.mark.parametrize(
    ("change", "status", "expected"),
    [
        ({"source": "jsonl:missing.jsonl"}, 1, "config.data.source=jsonl:missing.jsonl: no such file"),
        ({"source": ""}, 2, "give either source or mixture.sources"),
        ({"mixture": {"sources": {"a": "text:a"}}}, 2, "give either source or mixture.sources"),
        ({"validation": "1.5"}, 2, "config.data.validation=1.5"),
        ({"validation": "test"}, 2, "config.data.validation='test' should be KIND:PATH"),
        ({"preprocessors": ("stripe",)}, 2, "did you mean 'strip'"),
        ({"fields": {"text": "body"}}, 1, "no field 'body' among id, text; set config.data.fields.text"),
        ({"fields": {"inputs": "text"}}, 2, "give both inputs and targets"),
        ({"tokenizer": "missing.json"}, 1, "tokenizer missing.json: no such file"),
        ({"tokenizer": "train:bpe:10"}, 2, "at least 260"),
        ({"tokenizer": "task"}, 2, "config.data.tokenizer=task"),
        ({"tokenizer": ""}, 2, "config.data.tokenizer is empty; give bytes, a path, or train:bpe:SIZE"),
        ({"tokenizer": "train:bpe:300", "tokenizer_training_bytes": 0}, 2, "config.data.tokenizer_training_bytes=0"),
        ({"workers": -1}, 2, "config.data.workers=-1"),
    ],
)
def test_wrong_data_configs_are_named_in_one_line(source, tmp_path, change, status, expected):
    with pytest.raises(UserError) as caught:
        prepare.prepare(corpus.config(**{"source": source} | change), str(tmp_path), report=None)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_status == status


def test_a_worker_that_dies_is_named_with_what_it_was_doing():
    for job, expected in (
        ({"source": "seqio:tasks:both", "folder": "staging"}, "seqio:tasks:both"),
        ({"folder": "tokens-1", "index": 3}, "shard 3 of tokens-1"),
    ):
        worker = workers._Worker()
        worker._process.kill()
        with pytest.raises(UserError, match=f"signal 9\\) at {expected}; start again"):
            worker.run("describe_task", job, print)
        worker.end()


def test_a_cache_may_lie_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    config = corpus.config(source=corpus.write_jsonl(tmp_path / "a.jsonl", corpus.paragraphs(9)))
    prepare.prepare(config, "~/x", report=None)
    assert list((tmp_path / "home" / "x").glob("prepared-*.json")) and not (tmp_path / "~").exists()
    assert open_data(config, cache_dir="~/x", seed=0).describe()["components"]["train"]["documents"] == 9


def test_an_error_in_a_worker_is_the_same_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    config = corpus.config(source=f"jsonl:{tmp_path}/a.jsonl", workers=2)
    with child(config, tmp_path / "cache", stderr=subprocess.PIPE) as process:
        message = process.communicate()[1].strip().splitlines()[-1]
    assert message.endswith(
        "a.jsonl:2 (byte 14): field 'text' should be a text, is 3; mend it, or leave such records out: "
        "config.data.on_bad_record=skip"
    )


def test_half_a_surrogate_pair_is_named_and_can_be_replaced(tmp_path):
    """Valid JSON, and no text: it cannot be written as UTF-8."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "a \\ud83d b \\ud83d\\ude00"}\n')
    config = corpus.config(source=f"jsonl:{tmp_path}/a.jsonl")
    with pytest.raises(UserError) as caught:
        prepare.prepare(config, str(tmp_path / "cache"), report=None)
    assert f"{tmp_path}/a.jsonl:2 (byte 14): field 'text' holds a lone surrogate" in str(caught.value)
    assert "'replace_surrogates'" in str(caught.value) and str(caught.value).isascii()
    replaced = dataclasses.replace(config, preprocessors=("replace_surrogates",))
    prepare.prepare(replaced, str(tmp_path / "cache"), report=None)
    assert documents(replaced, tmp_path / "cache") == ["a", "a \ufffd b \U0001f600"]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_become_the_documents_that_they_hold(tmp_path, kind):
    texts, path = corpus.paragraphs(40), tmp_path / f"a.{kind}"
    if kind == "parquet":
        table = pyarrow.table({"number": list(range(40)), "text": texts})
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    else:
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([("number", "text"), *enumerate(texts)])
    config = corpus.config(source=f"{kind}:{path}", validation="0.2")
    prepare.prepare(config, str(tmp_path / "cache"), report=None)
    train, held_out = (documents(config, tmp_path / "cache", name) for name in ("train", "validation"))
    assert train + held_out == texts and 4 <= len(held_out) <= 12


def test_a_complete_cache_is_enough_where_the_text_is_not(tmp_path):
    config = corpus.config(source=corpus.write_jsonl(tmp_path / "a.jsonl", corpus.paragraphs(9)))
    before = prepare.prepare(config, str(tmp_path / "cache"), report=None)
    (tmp_path / "a.jsonl").unlink()
    after = prepare.prepare(config, str(tmp_path / "cache"), report=None)
    assert after.manifest == before.manifest and after.shards_written == 0
    with pytest.raises(UserError, match="no such file"):
        prepare.prepare(dataclasses.replace(config, validation="0.1"), str(tmp_path / "cache"), report=None)


def test_a_complete_cache_is_not_written_to(tmp_path, monkeypatch):
    source = corpus.write_jsonl(tmp_path / "a.jsonl", corpus.paragraphs(30))
    config = corpus.config(source=source, tokenizer="train:bpe:300", validation="0.2", verify=True)
    before = prepare.prepare(config, str(tmp_path / "cache"), report=None)

    def refused(path, *_):
        raise AssertionError(f"{path} is written")

    monkeypatch.setattr("t5x_like.storage.paths.write_bytes_atomic", refused)
    monkeypatch.setattr("t5x_like.storage.paths._renamed_at_end", refused)
    monkeypatch.setattr("t5x_like.data.token_shards._whole", refused)
    after = prepare.prepare(config, str(tmp_path / "cache"), report=None)
    assert after.manifest == before.manifest and after.shards_written == 0
    open_data(config, cache_dir=str(tmp_path / "cache"), seed=0).close()
