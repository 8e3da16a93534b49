"""The program of a row: our train step with the row's settings, compiled once and kept by the row's name.

What is kept is the compiled text, the compiler's memory and the mesh: a time model is applied to it in seconds, again
and again, while the step that would be compiled today may already be another.
"""

import dataclasses
import gzip
import json
import os
import pathlib
import subprocess
import zlib
from collections.abc import Sequence
from typing import Any

from t5x_like.core import environment
from tools.calibrate.programs import Program

BASE = "pretrain/llama3_8b"
_READ = {"asked", "mesh", "places", "text"}  # of what is kept


def folder() -> pathlib.Path:
    """Where compiled rows lie: below $XDG_CACHE_HOME, or ~/.cache."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "t5x_like" / "calibration"


def path(program: Program, where: pathlib.Path) -> pathlib.Path:
    return where / f"{program.name}.json.gz"


def read(program: Program, where: pathlib.Path) -> dict[str, Any] | None:
    """What was kept of a program; None where there is nothing that can be read, or it is of other settings."""
    try:
        content = json.loads(gzip.decompress(path(program, where).read_bytes()))
    except (OSError, EOFError, ValueError, zlib.error):
        return None
    if not isinstance(content, dict) or not _READ <= content.keys():
        return None  # a file of somebody else
    return content if content["asked"] == program.asked() else None


def compile_and_keep(program: Program, where: pathlib.Path) -> dict[str, Any]:
    """Compiles the program for its topology, minutes of a CPU, and keeps what the compiler says.

    UserError where it does not fit, or there is no compiler.
    """
    environment.apply(dataclasses.replace(environment.READING, platform="cpu"))
    from t5x_like.parallel import mesh as meshes
    from t5x_like.planner.compile import compile_program
    from t5x_like.runs import program as programs

    planned = experiment(program)
    mesh = meshes.make(planned.mesh, _devices(program))
    programs.check_mesh(planned, mesh.shape)
    built = programs.step_program(planned, mesh)
    arguments = (built.layout.state, built.layout.frozen, built.batch)
    compiled = compile_program(built.step, arguments, mesh=mesh)
    content = {
        "asked": program.asked(),
        "commit": _commit(),
        "mesh": dict(mesh.shape),
        "kind": mesh.devices.flat[0].device_kind,
        "places": [[getattr(d, "slice_index", 0) or 0, *d.coords, d.core_on_chip] for d in mesh.devices.flat],
        "memory_bytes": compiled.memory.total_bytes,
        "compile_seconds": compiled.compile_seconds,
        "text": compiled.text,
    }
    where.mkdir(parents=True, exist_ok=True)
    partial = path(program, where).with_suffix(".tmp")
    partial.write_bytes(gzip.compress(json.dumps(content).encode()))
    os.replace(partial, path(program, where))
    return content


def experiment(program: Program) -> Any:
    """The run (runs/train.py) whose train step the program is."""
    from t5x_like.runs import train
    from t5x_like.runs.arguments import load_config

    settings = {
        "data.batch_size": program.batch,
        "data.length": program.length,
        "model.remat": program.remat,
        **{f"model.{name}": value for name, value in program.model.items()},
        **{f"mesh.{name}": value for name, value in program.mesh.items()},
    }
    config, overrides = load_config([f"--config={BASE}"])
    for dotted, value in settings.items():
        *sections, last = dotted.split(".")
        node = config
        for name in sections:
            node = node[name]
        node[last] = value
    config["runtime"]["compiler_options"]["tpu"] = dict(program.options)
    return train.from_config(config, overrides=overrides)


def _devices(program: Program) -> Sequence[Any]:
    from t5x_like.planner import topology as topologies

    return topologies.topology(program.topology, slices=program.slices).devices


def _commit() -> str:
    here = pathlib.Path(__file__).parent
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    ).stdout.strip()
