"""Parts of a cache that several machines write are together the cache of one, whatever is killed or repeated."""

import dataclasses
import shutil

import pytest

from t5x_like.__main__ import main
from t5x_like.core.errors import UserError
from t5x_like.data import cache
from t5x_like.data.read.loader import open_data
from t5x_like.data.write import prepare, prepare_parts
from tests.data import corpus


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(prepare, "_SMALLEST_SHARD", 2000)
    monkeypatch.setattr(prepare, "_SHARDS", 1 << 20)


def contents(folder):
    """{file: content} of a cache, without what it remembers of sources that were not written just before."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if not name.startswith(("contents-", "files-"))}


@pytest.fixture
def config(tmp_path):
    source = corpus.write_jsonl(tmp_path / "a.jsonl", corpus.paragraphs(150))
    return corpus.config(source=source, tokenizer="train:bpe:300", validation="0.2")


def test_parts_and_a_finish_write_the_bytes_of_one_machine(config, tmp_path):
    one, parts = tmp_path / "one", tmp_path / "parts"
    prepare.prepare(config, str(one), report=None)
    counts = []
    for part in (2, 3, 1, 3):  # in any order, one of them twice
        counts.append(prepare_parts.prepare_part(config, str(parts), part, 3, report=None))
    assert sum(done.shards for done in counts[:3]) == counts[0].total > 9
    assert counts[3].written == 0 and all(done.written == done.shards for done in counts[:3])
    assert not list(parts.rglob("index.json")) and not list(parts.glob("prepared-*"))
    done = prepare_parts.finish(config, str(parts), report=None)
    assert contents(parts) == contents(one) and done.tokens > 0
    assert prepare.prepare(config, str(parts), report=None).shards_written == 0


def test_finish_names_what_is_missing_and_a_killed_part_is_repeated(config, tmp_path):
    one, parts = tmp_path / "one", tmp_path / "parts"
    for part in (1, 2):
        prepare_parts.prepare_part(config, str(parts), part, 3, report=None)
    with pytest.raises(UserError, match=r"shards are missing \(2, 5.*--part=I/N` again") as caught:
        prepare_parts.finish(config, str(parts), report=None)
    assert "\n" not in str(caught.value) and not list(parts.rglob("index.json"))
    prepare_parts.prepare_part(config, str(parts), 3, 3, report=None)
    [place] = [path for path in parts.glob("tokens-*") if len(list(path.glob("*.bin"))) > 6]
    (place / "shard-00003.json").unlink()  # killed between the two files of a shard
    (place / ".shard-00004.bin.elsewhere.1.writing").write_text("half")
    with open(place / "shard-00005.bin", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"2 of its \d+ shards are missing \(3, 5\)"):
        prepare_parts.finish(config, str(parts), report=None)
    again = [prepare_parts.prepare_part(config, str(parts), part, 2, report=None).written for part in (1, 2)]
    assert sum(again) == 2  # another number of parts finds the same shards
    prepare_parts.finish(config, str(parts), report=None)
    prepare.prepare(config, str(one), report=None)
    assert contents(parts) == contents(one)


def test_parts_meet_in_a_bucket(config, tmp_path, fake_gcs, monkeypatch):  # noqa: F811
    bucket = f"{fake_gcs.bucket()}/cache"
    for part in (1, 2):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"machine{part}"))
        prepare_parts.prepare_part(config, bucket, part, 2, report=None)
    monkeypatch.setattr("t5x_like.data.tokenizers.tokenizer_training.train", None)  # the bucket has it
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine3"))
    assert prepare_parts.prepare_part(config, bucket, 2, 2, report=None).written == 0
    prepare_parts.finish(config, bucket, report=None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "trainer"))
    data = open_data(dataclasses.replace(config, verify=True), cache_dir=bucket, seed=0)
    monkeypatch.undo()
    monkeypatch.setattr(prepare, "_SMALLEST_SHARD", 2000)
    monkeypatch.setattr(prepare, "_SHARDS", 1 << 20)
    assert data.fingerprint == corpus.opened(config, tmp_path / "one").fingerprint
    data.close()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--part=0/3"], "--part=0/3 should be I/N, such as 1/8 to 8/8"),
        (["--part=4/3"], "--part=4/3 should be I/N"),
        (["--part=x"], "--part=x should be I/N"),
        (["--part=1/3", "--finish"], "give --part=I/N or --finish, not both"),
    ],
)
def test_what_is_no_part_is_refused(tmp_path, capsys, arguments, expected):
    command = ["prepare", "--config=configs/pretrain/tiny.py", f"--workdir={tmp_path}", *arguments]
    assert main(command) == 2
    assert expected in capsys.readouterr().err


def test_the_command_writes_parts_and_finishes(tmp_path, capsys):
    command = ["prepare", "--config=configs/pretrain/tiny.py", f"--workdir={tmp_path / 'run'}"]
    command += ["--config.data.tokenizer=bytes"]
    for part in (1, 2):
        assert main([*command, f"--part={part}/2"]) == 0
        assert f"part {part} of 2 is there" in capsys.readouterr().out
    assert main([*command, "--finish"]) == 0
    assert "tokens of" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run")


def test_a_cache_that_is_not_finished_is_not_read(config, tmp_path):
    prepare_parts.prepare_part(config, str(tmp_path / "cache"), 1, 1, report=None)
    with pytest.raises(UserError, match="no token cache"):
        cache.read_manifest(config, str(tmp_path / "cache"))
