"""`prepare`: runs the preprocessing and the tokenizer once and writes the token cache, in processes, resumably.

Order: files and their fingerprints -> held-out text is cut off -> the tokenizer is loaded, or trained on what is
left -> shards that are missing are written -> the manifest. A killed run loses the shards being written. What the
result is does not depend on the number of workers. Reading the cache is data/loader.py.
"""

import dataclasses
import fractions
import hashlib
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from t5x_like.core.errors import UserError
from t5x_like.data import cache, encoding, preprocessors, sources, token_set, tokenizer_training, vocabularies, workers
from t5x_like.data.config import DataConfig
from t5x_like.data.sources import Source, SourceFile
from t5x_like.storage import paths

_HASH_WHOLE = 256 << 20  # bytes; of a longer file 64 parts of 1 MiB are hashed, evenly spaced
_SHARDS, _SMALLEST_SHARD, _LARGEST_SHARD = 64, 1 << 20, 256 << 20
_INLINE_BYTES = 4 << 20  # less than this is tokenized here, sooner than a worker starts

Report = Callable[[int, int], None]  # (bytes done, bytes in all)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What the cache now holds for a config, and what this call wrote of it (tokens_written, seconds)."""

    manifest: cache.Manifest
    documents: int
    tokens: int
    text_bytes: int
    skipped: int
    bytes_written: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class _Part:
    """A range of the offsets of a source's files: what becomes one token set."""

    source: Source
    files: tuple[SourceFile, ...]
    begin: int
    end: int
    content: str  # fingerprint of the files
    rate: float | None
    task: dict[str, Any] | None  # for SeqIO: {"task", "split", "shards"}


def prepare(config: DataConfig, cache_dir: str, *, report: Report | None) -> Prepared:
    """Makes the token cache of `config` complete in `cache_dir` (local or gs://). `report` is called with progress."""
    preprocessors.check(config.preprocessors, config.fields)
    started = time.monotonic()
    cache.fetch(config, cache_dir)
    folder = cache.local_folder(cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with workers.Pool(config.workers or _cores()) as pool:
        train, validation, described = _parts(config, folder, pool)
        tokenizer = _tokenizer(config, folder, list(train.values()), described)
        every = [*train.values(), *validation.values()]
        entries, written = _write_sets(config, folder, every, tokenizer, pool, report)
    named = [
        dict(zip(part, entries[i : i + len(part)], strict=True)) for i, part in ((0, train), (len(train), validation))
    ]
    manifest = cache.Manifest(tokenizer, *named)
    cache.write_manifest(config, cache_dir, manifest)
    indexes = [token_set.read_index(folder / entry.folder) for entry in entries]
    totals = [sum(index[key] for index in indexes) for key in ("documents", "tokens", "text_bytes", "skipped")]
    return Prepared(manifest, *totals, bytes_written=written, seconds=time.monotonic() - started)


def named_sources(config: DataConfig) -> dict[str, Source]:
    """{component: source} to train on."""
    if bool(config.source) == bool(config.mixture.sources):
        raise UserError("config.data: give either source or mixture.sources")
    if config.source:
        return {"train": sources.parse(config.source, where="config.data.source")}
    return {
        name: sources.parse(text, where=f"config.data.mixture.sources.{name}")
        for name, text in config.mixture.sources.items()
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Which parts of which files.


def _parts(
    config: DataConfig, folder: pathlib.Path, pool: workers.Pool
) -> tuple[dict[str, _Part], dict[str, _Part], str | None]:
    """(parts to train on, parts held out, folder of a SeqIO task's vocabulary)."""
    train: dict[str, _Part] = {}
    validation: dict[str, _Part] = {}
    vocabulary = None
    fraction = _fraction(config.validation)
    for name, source in named_sources(config).items():
        where = "config.data.source" if config.source else f"config.data.mixture.sources.{name}"
        if source.kind == "seqio":
            found, vocabulary = _task_parts(source, folder, pool)
            if fraction:
                raise UserError(f"config.data.validation: a fraction cannot be cut off {source}; give a split of it")
            if len(found) > 1 and not config.source:
                raise UserError(
                    f"{where}={source} is a mixture; name its tasks instead, or use it as config.data.source"
                )
            train |= found if config.source and len(found) > 1 else {name: next(iter(found.values()))}
            continue
        whole = _native_part(source, where)
        train[name], held_out = _cut(whole, fraction, where) if fraction else (whole, None)
        if held_out is not None:
            validation["validation" if config.source else name] = held_out
    if config.validation and fraction is None:
        source = sources.parse(config.validation, where="config.data.validation")
        if source.kind == "seqio":
            found, _ = _task_parts(source, folder, pool)
            validation = found if len(found) > 1 else {"validation": next(iter(found.values()))}
        else:
            validation["validation"] = _native_part(source, "config.data.validation")
    return train, validation, vocabulary


def _fraction(validation: str) -> fractions.Fraction | None:
    """The fraction that is to be held out; None when `validation` is empty or a source."""
    if not re.fullmatch(r"[0-9.]+(e-?[0-9]+)?", validation):
        return None
    try:
        fraction = fractions.Fraction(validation)
    except ValueError:
        fraction = fractions.Fraction(0)
    if not 0 < fraction < 1:
        raise UserError(f"config.data.validation={validation}: a fraction lies between 0 and 1; or give KIND:PATH")
    return fraction


def _native_part(source: Source, where: str) -> _Part:
    files = tuple(sources.files(source, where=where))
    content = cache.digest([_content(source, file) for file in files])
    return _Part(source, files, 0, sum(file.measure for file in files), content, None, None)


def _cut(whole: _Part, fraction: fractions.Fraction, where: str) -> tuple[_Part, _Part]:
    cut = int(whole.end * (1 - fraction))
    if not 0 < cut < whole.end:
        raise UserError(f"{where}={whole.source}: {whole.end} {sources.unit(whole.source.kind)}s are too few to divide")
    return dataclasses.replace(whole, end=cut), dataclasses.replace(whole, begin=cut)


def _content(source: Source, file: SourceFile) -> list[Any]:
    """Facts that change when the content of a file does."""
    if source.kind == "tfds":
        parts = [path for path in sorted(pathlib.Path(file.path).iterdir()) if path.is_file()]
        return [source.name, *([part.name, _hash(str(part))] for part in parts)]
    return [file.size, _hash(file.path)]


def _hash(path: str) -> str:
    digest, size = hashlib.sha256(), os.path.getsize(path)
    with open(path, "rb") as file:
        if size <= _HASH_WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        for part in range(64):
            file.seek(part * (size - (1 << 20)) // 63)
            digest.update(file.read(1 << 20))
    return digest.hexdigest()


def _task_parts(source: Source, folder: pathlib.Path, pool: workers.Pool) -> tuple[dict[str, _Part], str | None]:
    """({task: part}, folder of their vocabulary) of a SeqIO Task or Mixture, described by a worker."""
    staging = folder / f".task-vocabulary.{os.getpid()}"
    job = {"module": source.path, "name": source.name, "folder": str(staging), "source": str(source)}
    [facts] = pool.run("describe_task", [job], lambda index, amount: None)
    parts = {
        name: _Part(
            source,
            tuple(SourceFile(f"{source}#{name}-{shard}", 1, 1) for shard in range(task["shards"])),
            0,
            task["shards"],
            task["fingerprint"],
            task["rate"],
            {"task": name, "split": facts["split"], "shards": task["shards"]},
        )
        for name, task in facts["tasks"].items()
    }
    return parts, _place_vocabulary(vocabularies.load(str(staging)), folder) if facts["vocabulary"] else None


# The tokenizer.


def _tokenizer(config: DataConfig, folder: pathlib.Path, parts: list[_Part], described: str | None) -> str:
    """The tokenizer's folder within the cache."""
    trained = tokenizer_training.parse(config.tokenizer, where="config.data.tokenizer")
    if config.tokenizer == "task":
        if described is None:
            raise UserError("config.data.tokenizer=task: no seqio: source here has a vocabulary; give a tokenizer")
        return described
    if trained is None:
        place = _place_vocabulary(vocabularies.load(config.tokenizer), folder)
    else:
        place = _trained(config, folder, parts, trained)
    if described is not None and vocabularies.load(str(folder / described)).fingerprint != (
        vocabularies.load(str(folder / place)).fingerprint
    ):
        raise UserError(f"config.data.tokenizer={config.tokenizer} is not the vocabulary of the SeqIO task; use task")
    return place


def _place_vocabulary(vocabulary: vocabularies.Vocabulary, folder: pathlib.Path) -> str:
    name = f"tokenizer-{vocabulary.fingerprint[:16]}"
    if not (folder / name / vocabularies.SETTINGS).is_file():
        vocabulary.save(str(folder / name))
    return name


def _trained(config: DataConfig, folder: pathlib.Path, parts: list[_Part], trained: tuple[str, int]) -> str:
    """Trains unless the cache has the tokenizer of the same text; a small file remembers which that was."""
    if any(part.task for part in parts):
        raise UserError(f"config.data.tokenizer={config.tokenizer}: needs text; with seqio: sources use task or a path")
    text = [[part.content, part.begin, part.end, _reading(config, part)] for part in parts]
    recipe = cache.digest([trained, config.tokenizer_training_bytes, text])[:16]
    memory = folder / f"trained-{recipe}.json"
    if memory.is_file():
        name = paths.read_json(str(memory))["tokenizer"]
        if (folder / name / vocabularies.SETTINGS).is_file():
            return name
    texts = _training_texts(config, parts, config.tokenizer_training_bytes // len(parts))
    name = _place_vocabulary(tokenizer_training.train(*trained, texts), folder)
    paths.write_json_atomic(str(memory), {"tokenizer": name})
    return name


def _training_texts(config: DataConfig, parts: list[_Part], limit: int) -> Iterator[str]:
    """Texts of each part from its begin, up to `limit` characters of each."""
    for part in parts:
        pieces = sources.pieces(part.source.kind, part.files, part.begin, part.end)
        documents = encoding.read_pieces(part.source, part.files, pieces, config.fields, config.preprocessors)
        yield from encoding.first_texts(documents, limit)


def _reading(config: DataConfig, part: _Part) -> list[Any]:
    """What decides the text of a document besides the file."""
    plain = part.source.kind in ("text", "lines", "seqio")
    return [part.source.kind, None if plain else dataclasses.astuple(config.fields), list(config.preprocessors)]


# Token sets.


def _write_sets(
    config: DataConfig,
    folder: pathlib.Path,
    parts: list[_Part],
    tokenizer: str,
    pool: workers.Pool,
    report: Report | None,
) -> tuple[list[cache.SetEntry], int]:
    """Writes the shards that are missing; (entries of the manifest, bytes of source read for it)."""
    vocabulary = vocabularies.load(str(folder / tokenizer))
    kind = token_set.token_type(vocabulary.size)
    entries: list[cache.SetEntry] = []
    todo: list[tuple[str, dict[str, Any], float]] = []
    plans: list[tuple[str, str, list[dict[str, Any]]]] = []
    for part in parts:
        fingerprint = cache.digest(
            [
                token_set.VERSION,
                part.content,
                part.begin,
                part.end,
                part.task,
                _reading(config, part),
                vocabulary.fingerprint,
            ]
        )
        place = folder / f"tokens-{fingerprint[:16]}"
        place.mkdir(exist_ok=True)
        token_set.remove_leftovers(place)
        function, jobs = _jobs(config, part, place, str(folder / tokenizer), kind)
        plans.append((fingerprint, sources.unit(part.source.kind), jobs))
        weight = sum(file.size for file in part.files) / max(sum(file.measure for file in part.files), 1)
        todo += [(function, job, weight) for job in jobs if token_set.shard_facts(place, job["index"]) is None]
        entries.append(cache.SetEntry(place.name, str(part.source), tuple(f.path for f in part.files), part.rate))
    written = _run(todo, pool, config.workers, report)
    for entry, (fingerprint, unit, jobs) in zip(entries, plans, strict=True):
        place = folder / entry.folder
        shards = [token_set.shard_facts(place, job["index"]) for job in jobs]
        token_set.write_index(place, fingerprint=fingerprint, kind=kind, unit=unit, shards=[s for s in shards if s])
    return entries, written


def _jobs(
    config: DataConfig, part: _Part, place: pathlib.Path, tokenizer: str, kind: str
) -> tuple[str, list[dict[str, Any]]]:
    """(worker function, one job a shard)."""
    job: dict[str, Any] = {"folder": str(place), "tokenizer": tokenizer, "token_type": kind}
    if part.task is not None:
        named = {"module": part.source.path, "name": f"{part.task['task']}:{part.task['split']}"}
        shards = range(part.task["shards"])
        return "encode_task_shard", [
            {**job, **named, "index": shard, "shard": shard, "shards": len(shards), "size": 0} for shard in shards
        ]
    size = sum(file.size for file in part.files)
    target = min(max(size // _SHARDS, _SMALLEST_SHARD), _LARGEST_SHARD)
    groups = sources.divide(part.source.kind, part.files, part.begin, part.end, target)
    job |= {
        "kind": part.source.kind,
        "name": part.source.name,
        "files": [file.path for file in part.files],
        "fields": dataclasses.asdict(config.fields),
        "preprocessors": list(config.preprocessors),
    }
    return "encode_shard", [
        {
            **job,
            "index": index,
            "pieces": [dataclasses.astuple(piece) for piece in group],
            "size": sum(piece.end - piece.begin for piece in group),
        }
        for index, group in enumerate(groups)
    ]


def _run(todo: list[tuple[str, dict[str, Any], float]], pool: workers.Pool, size: int, report: Report | None) -> int:
    """Runs jobs, few small ones in this process; bytes of source read."""
    total = int(sum(job["size"] * weight for _, job, weight in todo))
    done = 0.0

    def tell(weight: float, amount: int) -> None:
        nonlocal done
        done += amount * weight
        if report is not None:
            report(int(done), total)

    native = [(job, weight) for function, job, weight in todo if function == "encode_shard"]
    if native and (size == 1 or total < _INLINE_BYTES):
        for job, weight in native:
            encoding.encode_shard(job, lambda amount, weight=weight: tell(weight, amount))
    elif native:
        pool.run("encode_shard", [job for job, _ in native], lambda index, amount: tell(native[index][1], amount))
    task = [job for function, job, _ in todo if function == "encode_task_shard"]
    if task:
        pool.run("encode_task_shard", task, lambda index, amount: None)
    return total
