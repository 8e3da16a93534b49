"""Which text a config means: files and tasks with their fingerprints, and what of them is held out.

A `Part` is a range of one source and becomes one token set. Nothing is tokenized here: that is data/write/prepare.py.
What a SeqIO source holds is asked of a worker and remembered in the cache, since importing SeqIO takes long.
"""

import dataclasses
import fractions
import hashlib
import os
import pathlib
import re
import tempfile
from collections.abc import Mapping
from typing import Any

from t5x_like.core.errors import UsageError, UserError
from t5x_like.data import cache
from t5x_like.data.config import DataConfig
from t5x_like.data.tokenizers import vocabularies
from t5x_like.data.write import memory, sources, tfds_reader, workers
from t5x_like.data.write.records import BOM
from t5x_like.data.write.sources import Source, SourceFile
from t5x_like.storage import paths

_HASH_WHOLE = 256 << 20  # bytes; of a longer file only parts of 1 MiB are hashed, evenly spaced
_HASH_PARTS = 64


@dataclasses.dataclass(frozen=True)
class Part:
    """A range of the offsets of a source's files: what becomes one token set."""

    source: Source
    files: tuple[SourceFile, ...]
    begin: int
    end: int
    content: str  # fingerprint of the files
    task: dict[str, Any] | None  # of a seqio source: {"task", "split", "shards"}


@dataclasses.dataclass(frozen=True)
class Parts:
    """{name: part} to train on and held out. `vocabulary`: folder in the cache of the vocabulary of SeqIO tasks."""

    train: dict[str, Part]
    validation: dict[str, Part]
    vocabulary: str | None


def named_sources(config: DataConfig) -> dict[str, Source]:
    """{component: source} to train on."""
    if bool(config.source) == bool(config.mixture.sources):
        raise UsageError("config.data: give either source or mixture.sources")
    if config.source:
        return {"train": sources.parse(config.source, where="config.data.source")}
    return {
        name: sources.parse(text, where=f"config.data.mixture.sources.{name}")
        for name, text in config.mixture.sources.items()
    }


def find(config: DataConfig, folder: pathlib.Path, pool: workers.Pool, share: memory.Share | None = None) -> Parts:
    """The parts of a config; `folder` is the cache's local one. UserError for every file that cannot be used.

    share: of several machines that do this for one cache at once, which this is
    """
    train: dict[str, Part] = {}
    validation: dict[str, Part] = {}
    described: list[str | None] = []
    fraction = _fraction(config.validation)
    for name, source in named_sources(config).items():
        where = "config.data.source" if config.source else f"config.data.mixture.sources.{name}"
        if source.kind == "seqio":
            found, vocabulary = _task_parts(source, folder, pool)
            described.append(vocabulary)
            train |= _named(found, name, several=bool(config.source), where=f"{where}={source}")
            if fraction:
                raise UsageError(f"config.data.validation: a fraction cannot be cut off {source}; give a split of it")
            continue
        whole = _native_part(source, where, folder, share)
        train[name], held_out = _cut(whole, fraction, where) if fraction else (whole, None)
        if held_out is not None:
            validation["validation" if config.source else name] = held_out
    if config.validation and fraction is None:
        source = sources.parse(config.validation, where="config.data.validation")
        if source.kind == "seqio":
            found, vocabulary = _task_parts(source, folder, pool)
            described.append(vocabulary)
            validation = _named(found, "validation", several=True, where="")
        else:
            validation["validation"] = _native_part(source, "config.data.validation", folder, share)
    known = sorted({name for name in described if name is not None})
    if len(known) > 1:
        raise UserError("config.data: the SeqIO tasks have different vocabularies; one model reads one")
    return Parts(train, validation, known[0] if known else None)


def _named(found: dict[str, Part], name: str, *, several: bool, where: str) -> dict[str, Part]:
    """A task takes the component's name; a mixture is its tasks by their own."""
    if len(found) == 1:
        return {name: next(iter(found.values()))}
    if not several:
        raise UsageError(f"{where} is a mixture; name its tasks instead, or use it alone as config.data.source")
    return found


def _fraction(validation: str) -> fractions.Fraction | None:
    """The fraction that is to be held out; None when `validation` is empty or a source."""
    if not re.fullmatch(r"[0-9.]+(e-?[0-9]+)?", validation):
        return None
    try:
        fraction = fractions.Fraction(validation)
    except ValueError:
        fraction = fractions.Fraction(0)
    if not 0 < fraction < 1:
        raise UsageError(
            f"config.data.validation={validation}: a fraction lies between 0 and 1; or give KIND:PATH, or nothing for "
            "none"
        )
    return fraction


def _native_part(source: Source, where: str, folder: pathlib.Path, share: memory.Share | None) -> Part:
    files = tuple(sources.files(source, where=where, folder=folder, share=share))
    state = memory.state_of_folder if source.kind == "tfds" else memory.state
    states = [state(file.path) for file in files]
    costs = [file.size if file.size <= _HASH_WHOLE else _HASH_PARTS << 20 for file in files]
    contents = memory.facts(
        "contents",
        source.kind if source.kind != "tfds" else [source.kind, source.name],
        states,
        lambda index: _content(source, files[index]),
        costs=costs,
        folder=folder,
        share=share,
    )
    content = cache.digest(contents)
    return Part(source, files, 0, sum(file.measure for file in files), content, None)


def _cut(whole: Part, fraction: fractions.Fraction, where: str) -> tuple[Part, Part]:
    cut = int(whole.end * (1 - fraction))
    if not 0 < cut < whole.end:
        raise UserError(f"{where}={whole.source}: {whole.end} {sources.unit(whole.source.kind)}s are too few to divide")
    return dataclasses.replace(whole, end=cut), dataclasses.replace(whole, begin=cut)


def _content(source: Source, file: SourceFile) -> list[Any]:
    """Facts that change when the content of a file does."""
    if source.kind == "tfds":
        inside = sorted(tfds_reader.names(file.path))
        return [source.name, *([name, _hash(paths.join(file.path, name))] for name in inside)]
    return [paths.size(file.path), _hash(file.path), *_marked(source, file)]


def _marked(source: Source, file: SourceFile) -> list[str]:
    """Of text that begins with a byte order mark, which earlier versions took for a part of it."""
    if source.kind not in ("text", "lines") or file.starts is not None:
        return []
    with paths.open_binary(file.path) as opened:
        return ["without byte order mark"] * (opened.read(len(BOM)) == BOM)


def _hash(path: str) -> str:
    digest, size = hashlib.sha256(), paths.size(path)
    with paths.open_binary(path) as file:
        if size <= _HASH_WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        for part in range(_HASH_PARTS):
            file.seek(part * (size - (1 << 20)) // (_HASH_PARTS - 1))
            digest.update(file.read(1 << 20))
    return digest.hexdigest()


def reading(config: DataConfig, part: Part) -> list[Any]:
    """What decides the text of a document besides the file."""
    plain = part.source.kind in ("text", "lines", "seqio")
    separator = [config.separator] if part.source.kind == "csv" and config.separator else []
    return [part.source.kind, None if plain else config.fields.given, list(config.preprocessors), *separator]


# SeqIO


def _task_parts(source: Source, folder: pathlib.Path, pool: workers.Pool) -> tuple[dict[str, Part], str | None]:
    """({task: part}, folder of their vocabulary) of a Task or Mixture."""
    facts = _described(source, folder, pool)
    found = {}
    for name, task in facts["tasks"].items():
        files = tuple(SourceFile(f"{source}#{name}-{shard}", 1, 1) for shard in range(task["shards"]))
        named = {"task": name, "split": facts["split"], "shards": task["shards"]}
        found[name] = Part(source, files, 0, task["shards"], task["fingerprint"], named)
    return found, facts["vocabulary"]


def _described(source: Source, folder: pathlib.Path, pool: workers.Pool) -> dict[str, Any]:
    """What a worker says about the source; from memory while the module and the data files are as they were."""
    memory = folder / f"task-{cache.digest(str(source))[:16]}.json"
    if memory.is_file():
        facts = paths.read_json(str(memory))
        tokenizer = facts["vocabulary"]
        kept = tokenizer is None or (folder / tokenizer / vocabularies.SETTINGS).is_file()
        if kept and all(_state(path) == state for path, state in facts["files"].items()):
            return facts
    if source.path.endswith(".py") and not os.path.isfile(source.path):
        raise sources.MissingSource(f"{source}: there is no file {source.path}")
    with tempfile.TemporaryDirectory(prefix="t5x_like-task-") as staging:
        job = {"module": source.path, "name": source.name, "folder": staging, "source": str(source)}
        [facts] = pool.run("describe_task", [job], lambda index, amount: None)
        there = facts["vocabulary"]
        facts["vocabulary"] = place_vocabulary(vocabularies.load(staging), folder) if there else None
    facts["files"] = {path: _state(path) for path in facts["files"]}
    cache.remember(memory, facts)
    return facts


def _state(path: str) -> list[int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def task_rates(
    source: Source, examples: Mapping[str, int], folder: pathlib.Path, pool: workers.Pool
) -> dict[str, float]:
    """{task: rate} of a mixture, as SeqIO computes it for tasks with so many cached examples."""
    fingerprints = {name: task["fingerprint"] for name, task in _described(source, folder, pool)["tasks"].items()}
    memory = folder / f"rates-{cache.digest([str(source), fingerprints, dict(examples)])[:16]}.json"
    if memory.is_file():
        return paths.read_json(str(memory))
    job = {"module": source.path, "name": source.name, "examples": dict(examples), "source": str(source)}
    [rates] = pool.run("task_rates", [job], lambda index, amount: None)
    cache.remember(memory, rates)
    return rates


def folder_name(vocabulary: vocabularies.Vocabulary) -> str:
    """Of a vocabulary in the cache."""
    template = vocabulary.chat_template
    mark = f"-{hashlib.sha256(template.encode()).hexdigest()[:8]}" if template else ""
    return f"tokenizer-{vocabulary.fingerprint[:16]}{mark}"


def place_vocabulary(
    vocabulary: vocabularies.Vocabulary, folder: pathlib.Path, *, with_chat_template: bool = False
) -> str:
    """Saves a vocabulary in the cache, unless it is there; the name of its folder."""
    vocabulary = vocabulary if with_chat_template else vocabulary.with_chat_template("")
    name = folder_name(vocabulary)
    if not (folder / name / vocabularies.SETTINGS).is_file():
        vocabulary.save(str(folder / name))
    return name
