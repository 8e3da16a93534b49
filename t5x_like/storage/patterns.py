"""Which files a path in a config means: local, `~` or gs://; a file, a folder, a glob, or a list of these.

A path that exists is itself, whatever characters its name holds. Else commas divide it ("a,b"), braces are written
out ("{a,b}.txt"), and each part is a path that exists or a glob. The same holds for a folder that a text begins with:
in "run [1]/*.txt" and "a,b/*.txt" it is itself if it exists.
"""

import contextlib
import fnmatch
import glob
import os
import re
import tempfile
from collections.abc import Callable, Iterator

from t5x_like.core.errors import UserError
from t5x_like.storage import paths

_MAGIC = re.compile(r"[*?\[\]{},]")
_SHOWN = 4


def one(text: str, *, what: str = "") -> str:
    """The one path that a text means: itself, though nothing may be there, or in full what its pattern matches.

    what: the begin of messages, such as "config.checkpoint.init_from=". Raises UserError, which names the matches,
    unless there is just one.

    >>> one("runs/tiny")
    'runs/tiny'
    """
    if not _MAGIC.search(text) or not is_pattern(text):
        return text
    found = sorted({paths.normal(path) for path in expand(text, inside=lambda folder: [folder])})
    if len(found) == 1:
        return found[0]
    where = f"{what}{text}"
    if not found:
        raise UserError(f"{where}: no file or folder has a name like this; expected just one, give its path")
    shown = ", ".join(found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")
    raise UserError(f"{where} matches {len(found)} paths ({shown}); expected just one, give the path of one of them")


def may_be(text: str, path: str) -> bool:
    """Whether a full path, which need not exist any more, is one that the text means."""
    wanted = [paths.normal(part) for part in (text, *parts(text))]
    return path in wanted or any(fnmatch.fnmatchcase(path, pattern) for pattern in wanted)


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
    folder = _existing(text)
    items = [[folder + item for item in _braces(first)] for first in _split(text[len(folder) :])[:1]]
    items += [parts(item) for item in _split(text[len(folder) :])[1:]]
    return [_home(item) for listed in items for item in listed if item]


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
    folder = _existing(pattern)
    if not glob.has_magic(pattern[len(folder) :]):
        return []
    pattern = re.sub(r"([*?\[])", r"[\1]", folder) + pattern[len(folder) :]
    return paths.glob(pattern.rstrip("/")) if paths.is_remote(pattern) else glob.glob(pattern, recursive=True)


def _existing(text: str) -> str:
    """The longest folder that the text begins with, if its name could be taken for a pattern; else ""."""
    for end in reversed([match.start() for match in re.finditer("/", text)]):
        if not _MAGIC.search(text[:end]):
            return ""
        if paths.is_directory(_home(text[:end])):
            return text[:end]
    return ""


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
