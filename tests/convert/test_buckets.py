"""Models in a bucket: ours are converted from there; those of other programs are copied to a disk first."""

import pathlib

import pytest

import t5x_like
from t5x_like import __main__ as program
from t5x_like.convert import convert, stored
from t5x_like.core.errors import UserError
from t5x_like.storage import paths

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
def theirs(bucket) -> str:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        paths.copy_file(str(STORIES / name), f"{bucket}/theirs/{name}")
    paths.write_bytes_atomic(f"{bucket}/t5x/checkpoint", b"\x82\xa7version\x03")
    return bucket


@pytest.mark.parametrize("name", ["theirs", "theirs/", "theirs/model.safetensors", "t5x"])
def test_a_model_of_another_program_is_one_line_that_says_to_copy_it(name, theirs, tmp_path, capsys):
    source = f"{theirs}/{name}"
    assert program.main(["convert", source, str(tmp_path / "target")]) == 1
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and printed.count(source) == 2, printed
    assert "copy it there first (`gcloud storage cp -r " in printed, printed
    assert not list(tmp_path.iterdir())
    for reader in (t5x_like.load, stored.open_model, lambda path: convert.to_native(path, str(tmp_path / "target"))):
        with pytest.raises(UserError, match="is read from a local disk"):
            reader(source)


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
