"""Damage in the cache is found, named with its shard, and repaired by removing that file alone."""

import concurrent.futures
import errno
import os
import resource

import numpy as np
import pytest

from t5x_like.core.errors import UserError
from t5x_like.data import token_set, token_shards
from t5x_like.data.open_files import OpenFiles, open_files
from t5x_like.data.read import packing
from t5x_like.data.read.loader import open_data
from t5x_like.data.write.prepare import prepare
from tests.data import corpus


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """(config, cache folder, folder of the only token set, which has several shards)"""
    monkeypatch.setattr("t5x_like.data.write.prepare._SMALLEST_SHARD", 1000)
    monkeypatch.setattr("t5x_like.data.write.prepare._SHARDS", 4)
    config = corpus.config(source=corpus.write_jsonl(tmp_path / "a.jsonl", corpus.paragraphs(60)))
    done = prepare(config, str(tmp_path / "cache"), report=None)
    return config, tmp_path / "cache", tmp_path / "cache" / done.manifest.train["train"].folder


def read_all(config, cache):
    data = open_data(config, cache_dir=str(cache), seed=0)
    rows = data.describe()["components"]["train"]["rows"]
    return np.stack([data.rows(step, np.arange(4))["inputs"] for step in range(rows // 4)])


@pytest.mark.parametrize("damage", ["truncated", "longer", "missing"])
def test_a_shard_of_another_size_is_named_when_it_is_opened(prepared, damage):
    config, cache, folder = prepared
    shard = folder / "shard-00002.bin"
    before = read_all(config, cache)
    if damage == "missing":
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size + (-5 if damage == "truncated" else 5))
    with pytest.raises(UserError, match="shard-00002.bin") as caught:
        read_all(config, cache)
    assert "\n" not in str(caught.value) and "t5x_like prepare" in str(caught.value)
    shard.unlink(missing_ok=True)
    others = {path: path.stat().st_mtime_ns for path in folder.glob("shard-*.bin")}
    prepare(config, str(cache), report=None)
    assert len(others) > 2 and all(path.stat().st_mtime_ns == time for path, time in others.items())
    assert np.array_equal(read_all(config, cache), before)


def test_more_shards_than_may_be_open_are_read_by_several_threads(prepared):
    _, _, folder = prepared
    all_open, few_open = (OpenFiles(limit) for limit in (100, 2))
    sets = [token_set.TokenSet(folder, verify=True, files=files) for files in (all_open, few_open)]
    expected, packed = (packing.Concatenated(tokens, length=16, stride=16) for tokens in sets)
    shards = len(corpus.open_below(folder)) - 2
    orders = [np.random.default_rng(number).permutation(packed.rows) for number in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        read = list(threads.map(packed.read, orders))
    for order, rows in zip(orders, read, strict=True):
        assert np.array_equal(rows.tokens, expected.read(order).tokens)
    assert shards > 4 and len(corpus.open_below(folder)) == shards + 2
    for tokens in sets:
        tokens.close()
    assert not corpus.open_below(folder)


def test_a_file_that_is_read_is_closed_when_it_has_been(tmp_path):
    paths = [str(tmp_path / name) for name in "ab"]
    for path in paths:
        (tmp_path / path).write_text(path)
    files = OpenFiles(1)
    first, second = files.get(paths[0]), files.get(paths[1])
    assert os.pread(first.descriptor, 100, 0).decode() == paths[0] and sorted(corpus.open_below(tmp_path)) == paths
    del first
    assert corpus.open_below(tmp_path) == [paths[1]] and files.get(paths[1]) is second


def test_as_many_files_are_open_as_the_process_may_have_beside_others(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = 2 * (max(map(int, os.listdir("/proc/self/fd"))) + 10)
    paths = [tmp_path / f"{number}" for number in range(limit)]
    for path in paths:
        path.touch()
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        files = open_files()
        for path in paths:
            files.get(str(path))
        assert len(corpus.open_below(tmp_path)) == limit // 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.ESTALE])
def test_a_shard_that_cannot_be_opened_is_not_called_damaged(prepared, monkeypatch, number):
    _, _, folder = prepared
    opened = os.open

    def refused(path, *arguments, **options):
        if str(path).endswith("shard-00002.bin"):
            raise OSError(number, os.strerror(number))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(UserError) as caught:
        token_set.TokenSet(folder, verify=False, files=open_files())
    assert str(caught.value) == f"{folder}/shard-00002.bin: {os.strerror(number)}"


def test_an_index_that_cannot_be_read_is_not_called_damaged(prepared):
    _, _, folder = prepared
    (folder / "index.json").unlink()
    (folder / "index.json").mkdir()
    with pytest.raises(UserError, match="index.json: Is a directory$"):
        token_set.read_index(folder)


def test_a_shard_that_shrinks_while_it_is_read_is_named(prepared):
    config, _, folder = prepared
    tokens = token_set.TokenSet(folder, verify=False, files=open_files())
    packed = packing.Concatenated(tokens, length=16, stride=16)
    os.truncate(folder / "shard-00001.bin", 100)
    with pytest.raises(UserError, match="shard-00001.bin: ends at byte"):
        packed.read(np.arange(packed.size.rows))


def test_a_flipped_byte_is_found_when_checksums_are_verified(prepared):
    config, cache, folder = prepared
    with open(folder / "shard-00001.bin", "r+b") as file:
        file.seek(7)
        byte = file.read(1)[0]
        file.seek(7)
        file.write(bytes([byte ^ 1]))
    token_set.TokenSet(folder, verify=False, files=open_files())  # the size is right
    with pytest.raises(UserError, match=r"shard-00001.bin: its sha256"):
        token_set.TokenSet(folder, verify=True, files=open_files())


@pytest.mark.parametrize("content", ["", "{", '{"version": 0}'])
def test_a_damaged_index_is_named(prepared, content):
    _, _, folder = prepared
    (folder / "index.json").write_text(content)
    with pytest.raises(UserError, match="index.json") as caught:
        token_set.TokenSet(folder, verify=False, files=open_files())
    assert "\n" not in str(caught.value)


def test_a_writer_that_fails_leaves_nothing_that_counts(tmp_path):
    def batches():
        yield token_shards.Encoded(*(np.arange(1, 4) for _ in range(2)), *(np.array([3]) for _ in range(4)), skipped=0)
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"shard-00000.bin cannot be written \(No space left on device\); free disk"):
        token_shards.write_shard(tmp_path, 0, batches(), "<u2")
    assert list(tmp_path.iterdir()) == []
