"""Models in a bucket: ours are read from there; those of other programs are copied to a temporary folder first."""

import gc
import pathlib
import tempfile

import pytest

import t5x_like
from t5x_like import __main__ as program
from t5x_like.convert import convert, staging, stored
from t5x_like.storage import model_directory, paths
from tests.convert import test_llama2c, test_t5x

STORIES = pathlib.Path(__file__).parents[1] / "data" / "stories260K"


@pytest.fixture(scope="module")
def bucket(fake_gcs) -> str:
    """theirs/: stories260K; ours/: the same as a model directory, copied there after the conversion."""
    return fake_gcs.bucket()


@pytest.fixture(scope="module")
def ours(bucket, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("ours") / "ours"
    convert.to_native(str(STORIES), str(folder))
    paths.copy_tree(str(folder), f"{bucket}/ours")
    return folder


@pytest.fixture(scope="module")
def theirs(bucket, tmp_path_factory) -> str:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        paths.copy_file(str(STORIES / name), f"{bucket}/theirs/{name}")
    folder = tmp_path_factory.mktemp("theirs")
    test_t5x._write(folder / "t5x", test_t5x._arrays(gated=True), zarr=True)
    paths.copy_tree(str(folder / "t5x"), f"{bucket}/t5x")
    paths.write_bytes_atomic(f"{bucket}/llama2c/model.bin", test_llama2c._file(tied=True))
    return bucket


@pytest.mark.parametrize("name", ["theirs", "theirs/", "th*s", "t5x", "llama2c/model.bin"])
def test_a_model_of_another_program_is_converted_as_from_a_disk(name, theirs, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    staging._copy.cache_clear()
    local = tmp_path / "copy"
    paths.copy_tree(f"{theirs}/{name.partition('/')[0].replace('th*s', 'theirs')}", str(local))
    source = str(local / "model.bin") if name.endswith(".bin") else str(local)
    assert program.main(["convert", f"{theirs}/{name}", str(tmp_path / "remote")]) == 0
    assert program.main(["convert", source, str(tmp_path / "local")]) == 0
    notes = [model_directory.read_metadata(f"{tmp_path}/{place}/checkpoints/0") for place in ("remote", "local")]
    assert notes[0]["fingerprints"] == notes[1]["fingerprints"] and notes[0]["config"] == notes[1]["config"]
    whole = paths.normal(f"{theirs}/{name.replace('th*s', 'theirs')}")
    assert [note["provenance"]["source"] for note in notes] == [whole, source]
    assert len(list(tmp_path.glob("t5x_like-model-*"))) == 1
    staging._copy.cache_clear()
    gc.collect()
    assert not list(tmp_path.glob("t5x_like-model-*"))


def test_a_hugging_face_folder_in_a_bucket_is_loaded(theirs):
    lm = t5x_like.load(f"{theirs}/theirs/")
    here = t5x_like.load(STORIES)
    assert lm.generate("Once", max_new_tokens=4, temperature=0) == here.generate(
        "Once", max_new_tokens=4, temperature=0
    )
    found = stored.open_model(f"{theirs}/theirs")
    assert found.directory == found.tokenizer_folder == f"{theirs}/theirs" and found.tokenizer


def test_a_model_that_takes_too_much_disk_or_is_damaged_is_one_line(theirs, tmp_path, monkeypatch, capsys):
    paths.copy_tree(f"{theirs}/theirs", f"{theirs}/damaged")
    paths.write_text_atomic(f"{theirs}/damaged/config.json", '{"model_type": "other"}')
    assert program.main(["convert", f"{theirs}/damaged", str(tmp_path / "target")]) == 1
    printed = capsys.readouterr().err
    assert f"{theirs}/damaged/config.json: model_type='other'" in printed and printed.count("\n") == 1
    paths.copy_tree(f"{theirs}/llama2c", f"{theirs}/beside")
    paths.copy_file(str(STORIES / "tokenizer.json"), f"{theirs}/beside/tokenizer.json")
    assert program.main(["convert", f"{theirs}/beside/model.bin", str(tmp_path / "target")]) == 1
    assert f"{theirs}/beside: its tokenizer has 512 tokens, its model 11" in capsys.readouterr().err
    assert program.main(["convert", f"{theirs}/theirs", str(tmp_path / "target"), "--verify"]) == 2
    assert "leave --verify out" in capsys.readouterr().err
    monkeypatch.setattr(staging, "_MOST_STAGED", 99)
    staging._copy.cache_clear()
    assert program.main(["convert", f"{theirs}/theirs", str(tmp_path / "target")]) == 1
    printed = capsys.readouterr().err
    assert "more than 99; copy them there (`gcloud storage cp -r " in printed and printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_is_no_model_is_one_line(bucket, tmp_path, capsys):
    assert program.main(["convert", f"{bucket}/nothing", str(tmp_path / "target")]) == 1
    printed = capsys.readouterr().err
    assert f"{bucket}/nothing is no model directory" in printed and printed.count("\n") == 1, printed


def test_a_model_directory_is_converted_as_from_a_disk(ours, bucket, tmp_path):
    assert program.main(["convert", f"{bucket}/ours", str(tmp_path / "remote")]) == 0
    assert program.main(["convert", str(ours), str(tmp_path / "local")]) == 0
    names = sorted(path.name for path in (tmp_path / "local").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "remote").iterdir()) and "tokenizer.json" in names
    for name in names:
        assert (tmp_path / "remote" / name).read_bytes() == (tmp_path / "local" / name).read_bytes(), name


def test_a_result_is_not_written_to_a_bucket(ours, bucket, capsys):
    assert program.main(["convert", str(ours), f"{bucket}/target"]) == 2
    assert "copy the result to its bucket afterwards" in capsys.readouterr().err
    assert not paths.exists(f"{bucket}/target")
