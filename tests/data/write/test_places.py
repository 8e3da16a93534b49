"""Where sources lie: any field may name any place; one may move, though its cache may not be written."""

import dataclasses
import gzip
import os
import pathlib

import pytest

from configs import common
from t5x_like.core.errors import UserError
from t5x_like.data.read.loader import open_data
from t5x_like.data.write import sources
from t5x_like.data.write.prepare import prepare
from t5x_like.storage import paths
from tests.data import corpus


def test_sources_of_a_mixture_and_held_out_text_lie_anywhere(fake_gcs, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    bucket, texts = fake_gcs.bucket(), corpus.paragraphs(30)
    places = {}
    for name, part in (("one", texts[:10]), ("two", texts[10:20]), ("held [out]", texts[20:])):
        places[name] = corpus.write_jsonl(tmp_path / f"{name}.jsonl", part)
        paths.copy_file(str(tmp_path / f"{name}.jsonl"), f"{bucket}/in/{name}.jsonl")

    def given(one, two, held_out):
        return corpus.config(mixture={"sources": {"one": one, "two": two}}, validation=held_out)

    expected = prepare(given(*places.values()), str(tmp_path / "cache"), report=None).manifest
    for chosen in (
        given("jsonl:~/one.jsonl", f"jsonl:{bucket}/in/two.jsonl", f"jsonl:{bucket}/in/held [out].jsonl"),
        given(f"jsonl:{bucket}/*/one.jsonl", "jsonl:~/{two,two}.jsonl", "jsonl:~/held*"),
        given(f"jsonl:{bucket}/in/{{one,one}}.jsonl", "jsonl:~/tw?.jsonl", "jsonl:~/held [out].jsonl"),
    ):
        found = prepare(chosen, str(tmp_path / "other"), report=None).manifest
        for part in ("train", "validation"):
            sets = [{name: entry.folder for name, entry in getattr(m, part).items()} for m in (expected, found)]
            assert sets[0] == sets[1]


@pytest.mark.parametrize("packed", [False, True])
def test_a_moved_source_needs_no_cache_that_may_be_written(tmp_path, monkeypatch, packed):
    source = corpus.write_jsonl(tmp_path / "a.jsonl", corpus.paragraphs(30))
    if packed:
        (tmp_path / "a.jsonl").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes(), mtime=0))
    config = corpus.config(source=source, tokenizer="train:bpe:300", validation="" if packed else "0.2")
    cache_dir, beside = str(tmp_path / "cache"), str(tmp_path / "run")
    before = corpus.opened(config, cache_dir)
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    moved = dataclasses.replace(config, source=f"jsonl:{tmp_path}/b.jsonl")
    names = sorted(os.listdir(cache_dir))
    corpus.make_read_only(monkeypatch, cache_dir)
    with pytest.raises(UserError, match="prepared-.* cannot be written"):
        prepare(moved, cache_dir, report=None)
    assert prepare(moved, cache_dir, report=None, beside=beside).shards_written == 0
    again = open_data(moved, cache_dir=cache_dir, seed=0, beside=beside)
    assert again.fingerprint == before.fingerprint and sorted(os.listdir(cache_dir)) == names
    (tmp_path / "b.jsonl").unlink()  # now the cache and what lies beside it are enough
    assert prepare(moved, cache_dir, report=None, beside=beside).manifest.train["train"].source == moved.source
    other = dataclasses.replace(config, source=corpus.write_jsonl(tmp_path / "c.jsonl", corpus.paragraphs(9)))
    with pytest.raises(UserError, match="cannot be written"):  # other text needs other tokens
        prepare(other, cache_dir, report=None, beside=beside)


@pytest.mark.parametrize("gone", ["/gone/site-packages/t5x_like/", "/gone/checkout/", ""])
def test_the_text_that_comes_with_the_program_is_found_where_the_program_is_now(tmp_path, monkeypatch, gone):
    monkeypatch.chdir(tmp_path)
    given = f"text:{gone}configs/data/tinyshakespeare/input.txt"
    [file] = sources.files(sources.parse(given, where="source"), where="source")
    assert pathlib.Path(file.path).samefile(pathlib.Path(common.bundled("tinyshakespeare/input.txt")))
    for missing in ("tinyshakespeare/none.txt", "", "../common/data.py"):
        with pytest.raises(UserError, match="no such file"):
            sources.files(sources.parse(f"text:{gone}configs/data/{missing}", where="source"), where="source")


def test_a_moved_source_and_a_bucket_that_may_not_be_written(fake_gcs, tmp_path, monkeypatch):
    """What the bucket has is fetched, what it lacks is kept beside it, and another machine reads both."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "first"))
    bucket, beside = f"{fake_gcs.bucket()}/cache", f"{fake_gcs.bucket()}/run/cache"
    source = corpus.write_jsonl(tmp_path / "a.jsonl", corpus.paragraphs(60))
    before = corpus.opened(corpus.config(source=source, validation="0.2"), bucket)
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    moved = corpus.config(source=f"jsonl:{tmp_path}/b.jsonl", validation="0.2")
    write, there = paths.write_bytes_atomic, paths.tree_files(bucket)

    def refused(path, data):
        if path.startswith(bucket):
            raise UserError(f"{path}: access refused (403)")
        write(path, data)

    monkeypatch.setattr(paths, "write_bytes_atomic", refused)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))
    with pytest.raises(UserError, match="access refused"):
        prepare(moved, bucket, report=None)
    assert prepare(moved, bucket, report=None, beside=beside).shards_written == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "third"))
    (tmp_path / "b.jsonl").unlink()
    assert open_data(moved, cache_dir=bucket, seed=0, beside=beside).fingerprint == before.fingerprint
    assert prepare(moved, bucket, report=None, beside=beside).manifest.train["train"].source == moved.source
    assert paths.tree_files(bucket) == there
