"""Which files a path in a config means: local, `~` or gs://; a file, a folder, a glob, or a list of these.

A path that exists is itself, whatever characters its name holds. Else commas divide it ("a,b"), braces are written
out ("{a,b}.txt"), and each part is a path that exists or a glob.
"""

import contextlib
import glob
import os
import re
import tempfile
from collections.abc import Callable, Iterator

from t5x_like.core.errors import UserError
from t5x_like.storage import paths


def expand(text: str, *, inside: Callable[[str], list[str]]) -> list[str]:
    """The files, each part in order of name and none twice; [] for each part that matches nothing.

    inside: the files that a folder stands for
    """
    found: list[str] = []
    for part in parts(text):
        matches = [part] if paths.exists(part) else sorted(_glob(part))
        for match in matches:
            found += inside(match) if paths.is_directory(match) else [match]
    return list(dict.fromkeys(found))


def parts(text: str) -> list[str]:
    """The paths and globs that a text lists, with `~` replaced."""
    if paths.exists(_home(text)):
        return [_home(text)]
    return [_home(one) for item in _split(text) for one in _braces(item) if one]


def is_pattern(text: str) -> bool:
    """Whether the text means several paths and not one."""
    return parts(text) != [_home(text)] or (not paths.exists(_home(text)) and glob.has_magic(text))


@contextlib.contextmanager
def staged(path: str, *, endings: tuple[str, ...], most: int) -> Iterator[str]:
    """A local path of a file or folder: itself, or a copy of one in a bucket that lives as long.

    Of the folder those files are copied that have one of the endings: they may take `most` bytes of disk together.
    """
    if not paths.is_remote(path):
        yield _home(path)
        return
    inside = paths.is_directory(path)
    if not inside and not paths.exists(path):
        raise UserError(f"{path}: no such file or folder")
    folder = path if inside else paths.parent(path)
    sizes = {
        name: size for name, size in paths.tree_files(folder).items() if "/" not in name and name.endswith(endings)
    }
    if sum(sizes.values()) > most:
        raise UserError(f"{path}: its files take {sum(sizes.values())} bytes, more than {most}; copy what is needed")
    with tempfile.TemporaryDirectory(prefix="t5x_like-staged-") as place:
        for name in sizes:
            paths.copy_file(paths.join(folder, name), os.path.join(place, name))
        yield place if inside else os.path.join(place, paths.base_name(path))


def _home(path: str) -> str:
    return path if paths.is_remote(path) else os.path.expanduser(path)


def _glob(pattern: str) -> list[str]:
    if not glob.has_magic(pattern):
        return []
    return paths.glob(pattern) if paths.is_remote(pattern) else glob.glob(pattern, recursive=True)


def _split(text: str) -> list[str]:
    """The text cut at the commas that stand outside of braces."""
    items, depth = [""], 0
    for character in text:
        depth += (character == "{") - (character == "}")
        if character == "," and depth <= 0:
            items.append("")
        else:
            items[-1] += character
    return items


def _braces(text: str) -> Iterator[str]:
    match = re.search(r"\{([^{}]*,[^{}]*)\}", text)
    if match is None:
        yield text
        return
    for choice in match.group(1).split(","):
        yield from _braces(text[: match.start()] + choice + text[match.end() :])
