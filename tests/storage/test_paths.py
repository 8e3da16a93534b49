"""Local files: whole or not at all, and one clear line for what is missing or damaged. gs:// is in test_gcs.py."""

import os

import pytest

from t5x_like.core.errors import UserError
from t5x_like.storage import paths


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = str(tmp_path / "a" / "config.json")
    paths.write_text_atomic(target, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(UserError, match=r"config.json cannot be written \(No space left on device\); free disk"):
            paths.write_text_atomic(target, "new")
    assert paths.read_text(target) == "old" and os.listdir(tmp_path / "a") == ["config.json"]
    paths.write_text_atomic(target, "new")
    assert paths.read_text(target) == "new"


def test_json_comes_back_as_it_was(tmp_path):
    value = {"b": [1, 2.5, None], "a": {"text": "\u00e9"}}
    paths.write_json_atomic(str(tmp_path / "x.json"), value)
    assert paths.read_json(str(tmp_path / "x.json")) == value == paths.as_json(value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"a": 1', "is damaged: no JSON"), (b"\xff\xfe{}", "is not UTF-8 text"), (None, "no such file")],
)
def test_a_damaged_file_is_one_line(tmp_path, content, message):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        paths.read_json(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_trees_are_listed_copied_renamed_and_removed(tmp_path):
    root = str(tmp_path / "tree")
    paths.write_text_atomic(paths.join(root, "a.txt"), "1")
    paths.write_text_atomic(paths.join(root, "b", "c.txt"), "22")
    assert paths.tree_files(root) == {"a.txt": 1, "b/c.txt": 2}
    assert paths.list_names(root) == ["a.txt", "b"] and paths.list_names(str(tmp_path / "none")) == []
    paths.copy_tree(root, str(tmp_path / "copy"))
    paths.rename(str(tmp_path / "copy"), str(tmp_path / "moved"))
    assert paths.tree_files(str(tmp_path / "moved")) == paths.tree_files(root)
    paths.remove_tree(root)
    paths.remove_tree(root)
    assert not paths.exists(root)
    with pytest.raises(UserError, match="tree: no such directory"):
        paths.copy_tree(root, str(tmp_path / "copy"))


def test_a_directory_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="a file stands there"):
        paths.make_directory(str(tmp_path / "file" / "workdir"))


def test_paths_are_joined_and_named_alike_here_and_there():
    assert paths.join("gs://b/run", "checkpoints", "3") == "gs://b/run/checkpoints/3"
    assert paths.parent("gs://b/run/x/") == "gs://b/run" and paths.base_name("gs://b/run/x/") == "x"
    assert paths.normal("gs://b/run/") == "gs://b/run" and paths.normal("/a/../b") == "/b"
    with pytest.raises(UserError, match="names no bucket"):
        paths.normal("gs://")
