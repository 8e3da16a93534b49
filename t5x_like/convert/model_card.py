"""The README.md of an exported folder: what it is, where it comes from, and what is not known of it."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

from t5x_like.core.terminal import format_count
from t5x_like.storage import manifest

# What the hub of Hugging Face calls what a model does, by our architectures.
_TASKS = {"decoder": "text-generation", "encoder_decoder": "text2text-generation", "encoder": "fill-mask"}
# Fields of a config that say what a run was, where it has them.
_RUN = {
    "data": "config.data.source",
    "objective": "config.objective.name",
    "optimizer": "config.optim.name",
    "learning rate": "config.optim.learning_rate",
    "steps": "config.loop.steps",
    "rows a step": "config.data.batch_size",
    "tokens a row": "config.data.length",
    "seed": "config.seed",
}


def text(name: str, note: Mapping[str, Any], starts: list[dict[str, Any]], *, form: str, parameters: int) -> str:
    """Markdown with the settings that the hub reads. note: the checkpoint's metadata; starts: of the run's manifest;
    form: in words, how the weights are written."""
    return "\n".join(_lines(name, note, starts, form=form, parameters=parameters)) + "\n"


def _lines(
    name: str, note: Mapping[str, Any], starts: list[dict[str, Any]], *, form: str, parameters: int
) -> Iterator[str]:
    model = note["config"]["model"]
    yield from ("---", "library_name: transformers", f"pipeline_tag: {_TASKS[model['architecture']]}", "---", "")
    yield f"# {name}"
    yield ""
    yield f"A model of the family {model['family']} with {format_count(parameters)} parameters, {form}."
    yield ""
    yield "## Where it comes from"
    yield ""
    saved = time.strftime("%Y-%m-%d", time.gmtime(note["time"]))
    yield f"- checkpoint: step {note['step']}, saved {saved}"
    yield f"- base: {_base(note)}"
    for label, path in _RUN.items():
        value = _at(note, path)
        if value not in (None, ""):
            yield f"- {label}: {value}"
    if starts:
        first, last = starts[0], starts[-1]
        yield f"- trained from {first.get('time')} in {len(starts)} start{'s'[: len(starts) > 1]}"
        yield f"- devices: {last.get('devices')} ({last.get('platform')})"
        yield f"- fingerprint of the data: {last.get('data')}"
        yield f"- config_sha256: {last.get('config_sha256')}"
    for metric, value in note.get("metrics", {}).items():
        yield f"- {metric}: {value}"
    yield ""
    yield "## How it was made"
    yield ""
    made, how = (starts[-1], "trained") if starts else (note.get("provenance", {}), "converted")
    yield f"- {how} with revision {_revision(made.get('revision'))}; {_versions(made.get('versions') or {})}"
    now = time.strftime("%Y-%m-%d", time.gmtime())
    yield f"- exported on {now} with revision {_revision(manifest.revision())}; {_versions(manifest.versions())}"
    yield "- SHA256SUMS holds the sha256 of every other file: `sha256sum -c SHA256SUMS`"
    yield ""
    yield "## Licence"
    yield ""
    yield "Unknown: it follows from the data and from the base above, of which nothing is recorded here."


def _base(note: Mapping[str, Any]) -> str:
    """What training began with."""
    checkpoint = _at(note, "config.checkpoint") or {}
    candidates = (
        _at(note, "base.directory"),
        checkpoint.get("branch_from"),
        checkpoint.get("init_from"),
        _at(note, "provenance.source"),
    )
    return next((str(found) for found in candidates if found), "none, it was trained from random weights")


def _at(node: Any, path: str) -> Any:
    for name in path.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def _revision(found: Any) -> str:
    if not isinstance(found, Mapping):
        return "unknown"
    return f"{found.get('commit')}{' with changes' if found.get('changed') else ''}"


def _versions(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items() if name in ("t5x_like", "jax", "python"))
