"""Compiled programs kept on disk, so that no program is compiled twice: what the compiler said, by what it was asked.

A file is named by a hash of all that decides what the compiler says: the lowered program, names of its operations
included, the devices, the compiler's options and versions. It holds text and numbers alone. Not here: how to compile.
"""

import gzip
import hashlib
import importlib.metadata
import json
import os
import pathlib
import tempfile
import time
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from t5x_like.planner.topology import compiler_version

# More than this is thrown away, the longest unread first.
BYTES = 4 * 2**30
_FORM = 1  # of the files; part of every key
_OF_OTHERS = ("--xla_cpu_", "--xla_gpu_", "--xla_force_host_platform_")  # flags of XLA that a TPU's compiler ignores
_ABANDONED = 86400  # s after which a file that was being written is taken to be that of a process that died


def folder() -> pathlib.Path:
    """Where programs lie unless somebody says otherwise: below $XDG_CACHE_HOME, or ~/.cache."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "t5x_like" / "plans"


def key(program: str, *, devices: Iterable[Any], options: Mapping[str, Any]) -> str:
    """The name of a program: of what it computes and where, in which compiler.

    program: the lowered module with the names of its operations, but not the places in files that these come from.
    options: of the compiler.
    """
    devices = list(devices)
    places = [(d.device_kind, getattr(d, "slice_index", 0), tuple(d.coords), d.core_on_chip) for d in devices]
    versions = [importlib.metadata.version("jax"), compiler_version()]
    versions.append(os.environ.get("LIBTPU_INIT_ARGS", ""))  # more options
    versions += [flag for flag in sorted(os.environ.get("XLA_FLAGS", "").split()) if not flag.startswith(_OF_OTHERS)]
    parts = (_FORM, versions, sorted(options.items()), places, program)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def read(where: pathlib.Path, name: str) -> dict[str, Any] | None:
    """What was kept under this name, None where there is nothing that can be read."""
    path = where / f"{name}.json.gz"
    try:
        content = json.loads(gzip.decompress(path.read_bytes()))
        os.utime(path)
    except (OSError, EOFError, ValueError, zlib.error):
        return None
    return content


def write(where: pathlib.Path, name: str, content: Mapping[str, Any]) -> None:
    """Keeps it; where the disk refuses, nothing is kept and nothing else happens."""
    try:
        where.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=where, prefix=f"{name}.", suffix=".tmp", delete=False) as file:
            file.write(gzip.compress(json.dumps(content).encode(), compresslevel=6))
        os.replace(file.name, where / f"{name}.json.gz")
        _prune(where)
    except OSError:
        return


def _prune(where: pathlib.Path) -> None:
    files = sorted(where.glob("*.json.gz"), key=lambda path: path.stat().st_mtime, reverse=True)
    held = 0
    for path in files:
        held += path.stat().st_size
        if held > BYTES:
            path.unlink(missing_ok=True)
    for path in where.glob("*.tmp"):
        if time.time() - path.stat().st_mtime > _ABANDONED:
            path.unlink(missing_ok=True)
