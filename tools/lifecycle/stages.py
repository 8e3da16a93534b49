"""The stages of a lifecycle as its config gives them, and what tells whether one has to run again."""

import dataclasses
import hashlib
import importlib.machinery
import inspect
import json
import os
import pathlib
import types
from collections.abc import Callable, Sequence
from typing import Any

from t5x_like.core.errors import UsageError, UserError
from t5x_like.runs.arguments import load_config, split_config

CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command of a lifecycle.

    name: its name in the table and of its files; says: what it does, a few words
    command: arguments of Python (`-m t5x_like train ...`)
    reads: files and folders; of a workdir its newest checkpoint counts. makes: the file or folder that it writes
    resumes: started again, the command goes on with what lies in `makes`; else that is removed before a start
    curves: names in the metrics.jsonl of `makes` that the page draws
    gains: what its outputs say of a model, as dicts for measures.py
    samples: (title, file of questions and answers) for the page
    """

    name: str
    says: str
    command: tuple[str, ...]
    reads: tuple[str, ...] = ()
    makes: str = ""
    resumes: bool = False
    curves: tuple[str, ...] = ()
    gains: tuple[dict[str, Any], ...] = ()
    samples: tuple[str, ...] = ()


def read(config: str, folder: str) -> list[Stage]:
    """What `get_stages(folder, [ARG])` of FILE[:ARG] returns, in an order in which they can run."""
    path, colon, text = config.partition(":")
    if not os.path.isfile(path):
        raise UsageError(
            f"--config={config}: there is no such file; give one with get_stages, such as configs/lifecycle/tiny.py"
        )
    loader = importlib.machinery.SourceFileLoader("lifecycle_config", path)
    module = types.ModuleType(loader.name)
    module.__file__ = path
    loader.exec_module(module)
    get_stages: Callable[..., Any] | None = getattr(module, "get_stages", None)
    if get_stages is None:
        raise UsageError(f"--config={config}: {path} has no function get_stages(folder)")
    stages = [_stage(each, f"--config={config}") for each in get_stages(folder, *([text] if colon else []))]
    _check(stages, folder, f"--config={config}")
    return stages


def _stage(given: dict[str, Any], where: str) -> Stage:
    known = {field.name for field in dataclasses.fields(Stage)}
    if unknown := sorted(set(given) - known):
        raise UsageError(f"{where}: a stage has the field {unknown[0]!r}; fields are {', '.join(sorted(known))}")
    if lacking := [name for name in ("name", "says", "command") if not given.get(name)]:
        raise UsageError(f"{where}: the stage {given.get('name', '')!r} lacks {lacking[0]}")
    fields: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in given.items()}
    return Stage(**fields)


def _check(stages: Sequence[Stage], folder: str, where: str) -> None:
    made = {stage.makes: number for number, stage in enumerate(stages) if stage.makes}
    names = [stage.name for stage in stages]
    for number, stage in enumerate(stages):
        if names.count(stage.name) > 1:
            raise UsageError(f"{where}: two stages are named {stage.name!r}; each needs a name of its own")
        for path in stage.reads:
            maker = made.get(path)
            if maker is not None and maker >= number:
                raise UsageError(f"{where}: the stage {stage.name!r} reads {path}, which a later stage makes; move it")
            if maker is None and not os.path.exists(path) and not _below(path, made):
                raise UsageError(
                    f"{where}: the stage {stage.name!r} reads {path}, which no stage makes and is not there"
                )


def _below(path: str, made: dict[str, int]) -> bool:
    return any(path.startswith(f"{each}/") for each in made)


def fingerprint(stage: Stage) -> str:
    """Of the command with the config that it names resolved, and of all that it reads."""
    chosen, others = split_config(stage.command)
    resolved: Any = None
    if any(argument.startswith("--config=") for argument in chosen):
        resolved, _ = load_config(chosen)
    for path in stage.reads:
        if not os.path.exists(path):
            raise UserError(f"the stage {stage.name!r} reads {path}, which is not there; run the stage that makes it")
    said = [others, resolved, {path: digest(path) for path in stage.reads}, stage.makes]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=_described).encode()).hexdigest()


def _described(value: Any) -> str:
    """What JSON has no form for: a function of a config file by its source."""
    return inspect.getsource(value) if callable(value) else repr(value)


def digest(path: str) -> str:
    """Of a file, of all files of a folder, or of what the newest checkpoint of a workdir says of its leaves."""
    found = hashlib.sha256()
    root = pathlib.Path(path)
    steps = sorted(int(each.name) for each in root.glob(f"{CHECKPOINTS}/*") if each.name.isdigit())
    if steps:
        root = root / CHECKPOINTS / str(steps[-1]) / "metadata"
    files = (
        [root]
        if root.is_file()
        else sorted(each for each in root.rglob("*") if each.is_file() and each.parent.name != "__pycache__")
    )
    for each in files:
        content = hashlib.sha256(each.read_bytes()).hexdigest()
        found.update(f"{each.relative_to(root)} {content}\n".encode())
    return found.hexdigest()
