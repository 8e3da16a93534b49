"""What a run was made with: one entry for each start, and the fingerprints of the files that must not change.

`manifest.json`: {"format", "starts": [entry, ...], "finished": {"step", "time"} once all steps are done, "goodput"}.
The last says what all starts have spent (training/goodput.py), as of the begin or the end of the newest. It imports no
array library: versions are read from the installed packages.
"""

import hashlib
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from t5x_like.core import formats
from t5x_like.core.errors import UserError
from t5x_like.storage import paths

NAME = "manifest.json"
_PACKAGES = ("t5x_like", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy")


def read(workdir: str) -> dict[str, Any]:
    """The manifest of a workdir; an empty one if it has none. Raises UserError, in one line, if it is damaged."""
    path = paths.join(workdir, NAME)
    if not paths.exists(path):
        return {"format": formats.FORMAT, "starts": []}
    content = paths.read_json(path)
    starts = content.get("starts") if isinstance(content, dict) else None
    if not isinstance(starts, list) or not all(isinstance(entry, dict) for entry in starts):
        raise UserError(
            f"{path} is damaged: it has no list of starts; restore the file from a copy, or use a new workdir"
        )
    formats.version(content, where=path)
    return content


def write(workdir: str, content: Mapping[str, Any]) -> None:
    paths.write_json_atomic(paths.join(workdir, NAME), content)


def start_entry(
    *,
    data: str,
    tokenizer: str,
    mesh: Mapping[str, int],
    platform: str,
    devices: int,
    processes: int,
    threads: int,
    resumed_from: int | None,
    branched_from: str | None = None,
    changes: Sequence[str] = (),
) -> dict[str, Any]:
    """The entry of a start, to which `Workdir.record_start` adds the digests of what it writes.

    `data` and `tokenizer` are their fingerprints; `resumed_from` the step restored, if any, and `branched_from` the
    checkpoint of another run that it comes from.
    """
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "revision": revision(),
        "versions": versions(),
        "data": data,
        "tokenizer": tokenizer,
        "mesh": dict(mesh),
        "platform": platform,
        "devices": devices,
        "processes": processes,
        "threads": threads,
        "resumed_from": resumed_from,
        "branched_from": branched_from,
        "changes": list(changes),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def revision() -> dict[str, Any] | None:
    """Commit of the source tree and whether it has changes; None where the code lies in no git repository."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(
                ["git", "-C", root, *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    # Only a repository that holds this file: an installed package may lie below a stranger's.
    if git("ls-files", "--error-unmatch", os.path.abspath(__file__)) is None:
        return None
    commit = git("rev-parse", "HEAD")
    return None if commit is None else {"commit": commit, "changed": bool(git("status", "--porcelain", "--", root))}


def config_digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(paths.json_text(config).encode()).hexdigest()


def file_digests(directory: str) -> dict[str, str]:
    """sha256 of every file below a directory, by relative path."""
    return {
        name: hashlib.sha256(paths.read_bytes(paths.join(directory, *name.split("/")))).hexdigest()
        for name in paths.tree_files(directory)
    }
