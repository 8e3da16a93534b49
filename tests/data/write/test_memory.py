"""What takes a reading of whole files is read once: remembered while they are as they were, shared between machines."""

import gzip
import os
import threading
import time

import pytest

from t5x_like.core.errors import UserError
from t5x_like.data.write import content, memory, parts, prepare, prepare_parts
from t5x_like.data.write.memory import Share
from t5x_like.storage import paths
from tests.data import corpus
from tests.data.write.test_prepare_parts import contents

LONG_AGO = 1_600_000_000


@pytest.fixture(autouse=True)
def _one_file_a_unit(monkeypatch):
    monkeypatch.setattr(memory, "_UNIT", 1)


@pytest.fixture
def files(tmp_path):
    """Twelve files that were written long ago."""
    found = [tmp_path / f"{number:02}.txt" for number in range(12)]
    for number, path in enumerate(found):
        path.write_text("text " * (number + 1))
        os.utime(path, (LONG_AGO, LONG_AGO))
    return [str(path) for path in found]


class Reader:
    """Reads files and counts it; `kill` after so many."""

    def __init__(self, files, seconds=0.0, kill=None):
        self.files, self.seconds, self.kill, self.done = files, seconds, kill, []

    def __call__(self, index):
        if self.kill is not None and len(self.done) == self.kill:
            raise KeyboardInterrupt
        time.sleep(self.seconds)
        self.done.append(index)
        return [index, os.path.getsize(self.files[index])]

    def facts(self, folder, share=None):
        states = [memory.state(path) for path in self.files]
        return memory.facts("sizes", "k", states, self, costs=[1] * len(states), folder=folder, share=share)


EXPECTED = [[number, 5 * (number + 1)] for number in range(12)]


def test_what_was_read_is_not_read_again_until_a_file_changes(files, tmp_path):
    first, again, changed = Reader(files), Reader(files), Reader(files)
    assert first.facts(tmp_path) == EXPECTED and sorted(first.done) == list(range(12))
    assert again.facts(tmp_path) == EXPECTED and again.done == []
    os.utime(files[3], (LONG_AGO, LONG_AGO + 1))
    assert changed.facts(tmp_path) == EXPECTED and len(changed.done) == 12


def test_a_file_that_has_just_changed_is_not_remembered(files, tmp_path):
    """Within the same tick of the clock it may change once more, and keep its time."""
    os.utime(files[3])
    for _ in range(2):
        reader = Reader(files)
        assert reader.facts(tmp_path) == EXPECTED and len(reader.done) == 12


def test_a_cache_that_is_read_only_or_damaged_costs_a_reading(files, tmp_path, monkeypatch):
    Reader(files).facts(tmp_path)
    [remembered] = tmp_path.glob("sizes-*.json")
    remembered.write_text("[")
    assert Reader(files).facts(tmp_path) == EXPECTED

    def refuse(path, value):
        raise UserError(f"{path} cannot be written (Read-only file system)")

    monkeypatch.setattr(paths, "write_json_if_other", refuse)
    remembered.unlink()
    assert Reader(files).facts(tmp_path) == EXPECTED


def test_machines_that_begin_together_read_each_file_about_once(files, tmp_path):
    readers, found = [Reader(files, seconds=0.05) for _ in range(3)], {}

    def run(number):
        found[number] = readers[number].facts(tmp_path, Share(str(tmp_path), number + 1, 3))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[number] == EXPECTED for number in range(3))
    assert [reader.done[0] for reader in readers] == [0, 4, 8]
    assert 12 <= sum(len(reader.done) for reader in readers) <= 18
    Reader(files).facts(tmp_path, Share(str(tmp_path), 1, 1))
    assert len(list(tmp_path.glob("sizes-*"))) == 1  # what was published in pieces is gone


def test_a_machine_alone_waits_for_nobody_and_takes_what_a_killed_one_found(files, tmp_path):
    killed, after, last = Reader(files, kill=3), Reader(files), Reader(files)
    with pytest.raises(KeyboardInterrupt):
        killed.facts(tmp_path, Share(str(tmp_path), 2, 4))
    assert after.facts(tmp_path, Share(str(tmp_path), 1, 4)) == EXPECTED
    assert sorted(killed.done + after.done) == list(range(12)) and after.done[:3] == [0, 1, 2]
    assert last.facts(tmp_path, Share(str(tmp_path), 2, 4)) == EXPECTED and last.done == []


def test_a_damaged_piece_is_read_again(files, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Reader(files, kill=3).facts(tmp_path, Share(str(tmp_path), 1, 4))
    [piece] = tmp_path.glob("sizes-*.shared/00001.json")
    piece.write_text("[")
    after = Reader(files)
    assert after.facts(tmp_path, Share(str(tmp_path), 2, 4)) == EXPECTED and 1 in after.done


def test_units_are_ranges_of_about_the_same_cost_and_not_too_many(monkeypatch):
    monkeypatch.setattr(memory, "_UNIT", 10)
    assert memory._units([4, 4, 4, 20, 1]) == [range(0, 3), range(3, 4), range(4, 5)]
    assert [i for unit in memory._units([5] * 9999) for i in unit] == list(range(9999))
    assert len(memory._units([5] * 9999)) <= memory._MOST_UNITS
    assert memory._units([]) == []


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Two sources of many files, a compressed one and a plain one, all written long ago."""
    monkeypatch.setattr(prepare, "_SMALLEST_SHARD", 2000)
    monkeypatch.setattr(prepare, "_SHARDS", 1 << 20)
    texts = corpus.paragraphs(120)
    for kind in ("plain", "packed"):
        (tmp_path / kind).mkdir()
        for number in range(6):
            path = tmp_path / kind / f"{number}.jsonl"
            corpus.write_jsonl(path, texts[number * 20 : (number + 1) * 20])
            if kind == "packed":
                path.write_bytes(gzip.compress(path.read_bytes(), mtime=0))
            os.utime(path, (LONG_AGO, LONG_AGO))
    named = {kind: f"jsonl:{tmp_path}/{kind}" for kind in ("plain", "packed")}
    return corpus.config(mixture={"sources": named}, tokenizer="train:bpe:300", validation="0.2")


@pytest.fixture
def counted(monkeypatch):
    """{what is done: how often to each file}: hashing, and reading a compressed file for its length."""
    found = {"hash": [], "length": []}
    for name, module, function in (("hash", parts, "_hash"), ("length", content, "length")):
        real = getattr(module, function)

        def counting(path, real=real, name=name):
            found[name].append(path)
            return real(path)

        monkeypatch.setattr(module, function, counting)
    return found


def test_parts_share_the_reading_and_write_the_bytes_of_one_machine(config, tmp_path, counted):
    prepare.prepare(config, str(tmp_path / "one"), report=None)
    assert len(counted["hash"]) == 12
    for name in counted:
        counted[name].clear()
    for part in (2, 1, 3, 2):
        prepare_parts.prepare_part(config, str(tmp_path / "parts"), part, 3, report=None)
    prepare_parts.finish(config, str(tmp_path / "parts"), report=None)
    assert len(counted["hash"]) == len(set(counted["hash"])) == 12
    assert len([path for path in counted["length"] if "packed" in path]) == 6
    assert contents(tmp_path / "parts") == contents(tmp_path / "one") and not list(tmp_path.rglob("*.shared"))
    prepare.prepare(config, str(tmp_path / "one"), report=None)
    assert len(counted["hash"]) == 12  # nor does one machine again what it did before


def test_parts_that_saw_other_data_are_found_at_the_end(config, tmp_path):
    cache = str(tmp_path / "cache")
    prepare_parts.prepare_part(config, cache, 1, 2, report=None)
    changed = tmp_path / "plain" / "3.jsonl"
    text = changed.read_text()
    changed.write_text(text.replace("fox", "cat"))
    os.utime(changed, (LONG_AGO, LONG_AGO + 5))
    prepare_parts.prepare_part(config, cache, 2, 2, report=None)
    with pytest.raises(UserError, match="shards are missing"):
        prepare_parts.finish(config, cache, report=None)
    prepare_parts.prepare_part(config, cache, 1, 2, report=None)
    prepare_parts.finish(config, cache, report=None)
    one = prepare.prepare(config, str(tmp_path / "one"), report=None)
    assert prepare.prepare(config, cache, report=None).manifest == one.manifest


def test_parts_share_the_reading_over_a_bucket(config, tmp_path, fake_gcs, monkeypatch, counted):
    bucket = f"{fake_gcs.bucket()}/cache"
    for part in (1, 2, 3):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"machine{part}"))
        if part < 3:
            prepare_parts.prepare_part(config, bucket, part, 2, report=None)
        else:
            prepare_parts.finish(config, bucket, report=None)
    assert len(counted["hash"]) == 12 and not [name for name in paths.list_names(bucket) if name.endswith(".shared")]
