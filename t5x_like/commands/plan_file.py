"""The files of a plan, a budget or a check: that they can be written is said before anything is computed."""

import json
import os
import pathlib
import tempfile
from typing import Any

from t5x_like.core.errors import UserError
from t5x_like.storage import paths


def writable(path: str, *, option: str = "json") -> pathlib.Path:
    """The path of `--OPTION`, if it can be written: better said before minutes of compiling than after."""
    if paths.is_remote(path):
        raise UserError(f"--{option}={path}: a plan is written to a disk; copy it to its bucket afterwards")
    target = pathlib.Path(paths.normal(path))
    if not target.parent.is_dir():
        raise UserError(f"--{option}={path}: {target.parent} is no folder")
    if target.is_dir():
        raise UserError(f"--{option}={path} is a folder; name a file in it")
    if not os.access(target.parent, os.W_OK):
        raise UserError(f"--{option}={path}: {target.parent} is not writable; choose another folder")
    return target


def write(target: pathlib.Path, text: str) -> None:
    """Whole or not at all, also where two plans write to one path. UserError where the disk does not take it."""
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=target.parent, prefix=f"{target.name}.", suffix=".tmp", delete=False
        ) as file:
            temporary = file.name
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        if temporary is not None:
            pathlib.Path(temporary).unlink(missing_ok=True)
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from None


def write_json(target: pathlib.Path, content: Any) -> None:
    write(target, json.dumps(content, indent=2) + "\n")
