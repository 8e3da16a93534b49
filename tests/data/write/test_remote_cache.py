"""A token cache in a bucket: prepared once, copied to another machine's disk once, and read there."""

import dataclasses
import shutil

import numpy as np
import pytest

from t5x_like.core.errors import UserError
from t5x_like.data import cache
from t5x_like.data.read.loader import open_data
from t5x_like.data.write.prepare import prepare
from t5x_like.storage import paths
from tests.data import corpus


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Makes this process one with an empty disk."""

    def fresh(name):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))

    fresh("first")
    return fresh


def test_a_cache_in_a_bucket_is_prepared_once_and_read_on_another_machine(fake_gcs, machine, tmp_path):  # noqa: F811
    bucket = f"{fake_gcs.bucket()}/run/cache"
    source = corpus.write_jsonl(tmp_path / "a.jsonl", corpus.paragraphs(60))
    config = corpus.config(source=source, tokenizer="train:bpe:300", validation="0.2")
    here = corpus.opened(config, bucket)
    assert {name.split("/")[0].split("-")[0] for name in paths.tree_files(bucket)} == {
        "prepared",
        "tokens",
        "tokenizer",
    }

    machine("second")
    (tmp_path / "a.jsonl").unlink()  # the text is not there, only the bucket
    there = open_data(config, cache_dir=bucket, seed=0)
    assert there.fingerprint == here.fingerprint
    for step in range(3):
        left, right = (data.rows(step, np.arange(4)) for data in (here, there))
        assert all(np.array_equal(left[name], right[name]) for name in left)
    copied = {path: path.stat().st_mtime_ns for path in cache.local_folder(bucket).rglob("shard-*.bin")}
    open_data(config, cache_dir=bucket, seed=0)
    assert copied and all(path.stat().st_mtime_ns == time for path, time in copied.items())

    machine("third")
    corpus.write_jsonl(tmp_path / "a.jsonl", corpus.paragraphs(60))
    assert prepare(config, bucket, report=None).shards_written == 0  # fetched instead of tokenized again


def test_a_bucket_without_the_cache_says_so(fake_gcs, machine):  # noqa: F811
    with pytest.raises(UserError, match="run `t5x_like prepare`"):
        open_data(corpus.config(source="text:a"), cache_dir=fake_gcs.bucket(), seed=0)


def test_a_damaged_local_copy_is_fetched_again(fake_gcs, machine, tmp_path):  # noqa: F811
    bucket = fake_gcs.bucket()
    config = corpus.config(source=corpus.write_jsonl(tmp_path / "a.jsonl", corpus.paragraphs(20)))
    before = corpus.opened(config, bucket)
    [shard] = cache.local_folder(bucket).rglob("shard-*.bin")
    shard.write_bytes(shard.read_bytes()[:-9])
    again = open_data(dataclasses.replace(config, verify=True), cache_dir=bucket, seed=0)
    assert np.array_equal(again.rows(0, np.arange(4))["inputs"], before.rows(0, np.arange(4))["inputs"])
    shutil.rmtree(cache.local_folder(bucket))
