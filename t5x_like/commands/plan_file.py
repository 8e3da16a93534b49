"""The JSON file of a plan, a budget or a check: that it can be written is said before anything is computed."""

import json
import os
import pathlib
from typing import Any

from t5x_like.core.errors import UserError
from t5x_like.storage import paths


def writable(path: str) -> pathlib.Path:
    """The path of `--json`, if its folder is there: better said before minutes of compiling than after."""
    if paths.is_remote(path):
        raise UserError(f"--json={path}: a plan is written to a disk; copy it to its bucket afterwards")
    target = pathlib.Path(paths.normal(path))
    if not target.parent.is_dir():
        raise UserError(f"--json={path}: {target.parent} is no folder")
    return target


def write(target: pathlib.Path, content: Any) -> None:
    temporary = target.with_name(f"{target.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, target)
