"""A model of another program that lies in a bucket, copied to a temporary folder once a process: it is opened twice.

The copy takes as much disk as the files of the model, 64 GiB at most, and goes when the process ends.
"""

import contextlib
import functools
import os
import tempfile
from collections.abc import Iterator

from t5x_like.core.errors import UserError
from t5x_like.storage import paths

_MOST_STAGED = 64 << 30  # bytes of disk
_OF_FOLDER = (".json", ".model", ".txt", ".jinja", ".safetensors")
_BESIDE = ("tokenizer.json", ".model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@contextlib.contextmanager
def staged(path: str, *, whole: bool) -> Iterator[str]:
    """A local path of a file or folder of a model, with the tokenizers that lie beside a file or a T5X checkpoint.

    whole: all below the folder is copied, as of T5X, whose arrays are folders. Errors inside name the path in the
    bucket. Raises UserError where the files take too much disk.
    """
    copy = _copy(path, whole)
    try:
        yield os.path.join(copy.name, paths.base_name(path))
    except UserError as error:
        raise type(error)(str(error).replace(copy.name, paths.parent(path))) from None


@functools.cache
def _copy(path: str, whole: bool) -> "tempfile.TemporaryDirectory[str]":
    root, base = paths.parent(path), paths.base_name(path)
    names = {f"{base}/{name}": size for name, size in paths.tree_files(path).items() if name}
    if names and not whole:
        names = {name: size for name, size in names.items() if name.count("/") == 1 and name.endswith(_OF_FOLDER)}
    else:
        beside = [name for name in paths.list_names(root) if name.endswith(_BESIDE) or name == base and not names]
        names |= {name: paths.size(paths.join(root, name)) for name in beside}
    if sum(names.values()) > _MOST_STAGED:
        raise UserError(
            f"{path}: its files take {sum(names.values())} bytes of disk, more than {_MOST_STAGED}; copy them there "
            f"(`gcloud storage cp -r {path} .`) and give the copy"
        )
    copy = tempfile.TemporaryDirectory(prefix="t5x_like-model-")
    for name in names:
        paths.copy_file(paths.join(root, *name.split("/")), os.path.join(copy.name, *name.split("/")))
    return copy
