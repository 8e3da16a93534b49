"""What a path in a config means: for a field of one path just one, named in full; buckets and disks alike."""

import os

import pytest

from t5x_like.core.errors import UserError
from t5x_like.storage import paths, patterns

NAMES = ("runs/tiny-a", "runs/big [1]", "runs/x,y", "runs/{a,b}", "runs/a", "runs/tail@120")


@pytest.fixture(params=["disk", "bucket"])
def root(request, tmp_path):
    """A folder, on a disk or in a bucket, in which each of NAMES is a folder with the files 1.txt and 2.txt."""
    place = str(tmp_path) if request.param == "disk" else f"{request.getfixturevalue('fake_gcs').bucket()}/home"
    for name in NAMES:
        for file in ("1.txt", "2.txt"):
            paths.write_text_atomic(paths.join(place, *name.split("/"), file), name)
    return place


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        *((name, name) for name in NAMES),
        ("runs/tiny-a/", "runs/tiny-a"),
        ("runs/tiny-*", "runs/tiny-a"),
        ("runs/tiny-[ab]", "runs/tiny-a"),
        ("runs/{no,tiny-a}", "runs/tiny-a"),
        ("runs/tiny-*,runs/tiny-a", "runs/tiny-a"),
        ("*/tiny-*/1.txt", "runs/tiny-a/1.txt"),
        ("runs/big [1]/1*", "runs/big [1]/1.txt"),
        ("runs/x,y/{1,3}.txt", "runs/x,y/1.txt"),
        ("runs/{a,b}/?1.txt,{root}/runs/a/1.txt", "runs/a/1.txt"),
        ("runs/nothing-there", "runs/nothing-there"),
    ],
)
def test_one_path_is_what_there_is_or_the_only_match(root, text, meant):
    given = f"{root}/{text.replace('{root}', root)}"
    assert paths.normal(patterns.one(given, what="config.a=")) == f"{root}/{meant}"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("runs/no-*", ["no file or folder has a name like this"]),
        ("runs/{no,none}", ["no file or folder has a name like this"]),
        ("runs/t*", ["matches 2 paths", "runs/tail@120", "runs/tiny-a", "give the path of one of them"]),
        ("runs/*", ["matches 6 paths", "runs/a, ", ", ..."]),
        ("runs/{a,tiny-a}", ["matches 2 paths", "runs/a, ", "runs/tiny-a)"]),
    ],
)
def test_none_or_several_are_one_line_that_names_them(root, text, names):
    with pytest.raises(UserError) as caught:
        patterns.one(f"{root}/{text}", what="config.checkpoint.init_from=")
    line = str(caught.value)
    assert line.startswith(f"config.checkpoint.init_from={root}/{text}") and "\n" not in line
    assert all(name in line for name in names), line


def test_a_folder_with_any_name_is_listed_copied_renamed_and_removed(root):
    source = f"{root}/runs/big [1]"
    assert [os.path.basename(path) for path in patterns.expand(f"{source}/*.txt", inside=lambda f: [f])] == [
        "1.txt",
        "2.txt",
    ]
    paths.copy_tree(source, f"{root}/copy {{1,2}}*")
    assert paths.tree_files(f"{root}/copy {{1,2}}*") == {"1.txt": 12, "2.txt": 12}
    paths.rename(f"{root}/copy {{1,2}}*", f"{root}/moved?")
    assert paths.read_text(f"{root}/moved?/2.txt") == "runs/big [1]" and not paths.exists(f"{root}/copy {{1,2}}*")
    paths.remove_tree(f"{root}/moved?")
    assert not paths.exists(f"{root}/moved?") and paths.list_names(source) == ["1.txt", "2.txt"]


def test_home_and_relative_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home [me]"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home [me]" / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "big").mkdir(parents=True)
    whole = str(tmp_path / "home [me]" / "runs" / "tiny")
    assert paths.normal(patterns.one("~/runs/tiny/")) == whole and patterns.one("~/runs/t*") == whole
    assert patterns.one("runs/b*") == patterns.one("./runs/*") == str(tmp_path / "runs" / "big")


def test_what_a_pattern_meant_may_be_gone(tmp_path):
    assert patterns.may_be(f"{tmp_path}/wsd-*", f"{tmp_path}/wsd-1") and patterns.may_be(
        f"{tmp_path}/a/", f"{tmp_path}/a"
    )
    assert not patterns.may_be(f"{tmp_path}/wsd-*", f"{tmp_path}/other")
