"""`prepare`: runs the preprocessing and the tokenizer once and writes the token cache, in processes, resumably.

Order: files and their fingerprints -> held-out text is cut off -> the tokenizer is loaded, or trained on what is
left -> shards that are missing are written -> the manifest. A killed run loses the shards being written. What the
result is does not depend on the number of workers. Reading the cache is data/read/loader.py.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Container
from typing import Any

from t5x_like.core.environment import cores
from t5x_like.core.errors import UsageError
from t5x_like.data import cache, token_set, token_shards
from t5x_like.data.config import DataConfig
from t5x_like.data.write import (
    bad_records,
    chats,
    chosen_tokenizer,
    encoding,
    memory,
    parts,
    preprocessors,
    sources,
    workers,
)
from t5x_like.data.write.chosen_tokenizer import Training
from t5x_like.data.write.parts import Part, Parts
from t5x_like.storage import paths

_SHARDS, _SMALLEST_SHARD, _LARGEST_SHARD = 64, 1 << 20, 256 << 20
_INLINE_BYTES = 4 << 20  # less than this is tokenized here, sooner than a worker starts


@dataclasses.dataclass(frozen=True)
class Writing:
    """How far the writing of token sets is: `done` of `total` "bytes" of files, or "examples" of SeqIO's tasks.

    Nobody knows how many examples a task has before it has run: then `total` is None.
    """

    unit: str
    done: int
    total: int | None


Report = Callable[[Training | Writing], None]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What the cache now holds for a config; `shards_written`, with so much text, by this call in `seconds`.

    contents: a fingerprint of the files of each set to train on, by its name; {} where they are not on this machine.
    skipped: documents without a token; bad: records left out; bad_places: a line for each of the first of them
    """

    manifest: cache.Manifest
    contents: dict[str, str]
    documents: int
    tokens: int
    text_bytes: int
    skipped: int
    empty_files: int
    bad: int
    bad_places: tuple[str, ...]
    shards_written: int
    text_bytes_written: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class SetPlan:
    """How a token set is written: `jobs` of a worker's `function`, one a shard; `weight`: bytes of each unit read."""

    place: pathlib.Path
    fingerprint: str
    unit: str
    kind: str
    function: str
    jobs: list[dict[str, Any]]
    weight: float
    part: Part
    config: DataConfig

    def facts(self) -> list[dict[str, Any] | None]:
        """What each shard says of itself, None for those that are not there."""
        return [token_shards.shard_facts(self.place, job["index"]) for job in self.jobs]

    def todo(self, shards: Container[int] | None = None) -> list[tuple[str, dict[str, Any], float]]:
        """The jobs of the shards that are not there, of all or of those with these numbers."""
        pairs = zip(self.jobs, self.facts(), strict=True)
        missing = [job for job, facts in pairs if facts is None and (shards is None or job["index"] in shards)]
        return [(self.function, job, self.weight) for job in _joined(self.function, missing, self.part)]

    def write_index(self, shards: list[dict[str, Any]]) -> None:
        """Declares the set complete. UserError for too many bad records."""
        token_shards.write_index(
            self.place,
            fingerprint=self.fingerprint,
            kind=self.kind,
            unit=self.unit,
            shards=shards,
            notes=_notes(self.config, self.part, shards),
        )


def prepare(
    config: DataConfig, cache_dir: str, *, report: Report | None, tokenizer: str = "", beside: str = ""
) -> Prepared:
    """Makes the token cache of `config` complete in `cache_dir` (local or gs://). `report` is called with progress.
    `tokenizer` is a folder where the config's tokenizer was saved before; then it is not looked for, nor trained.
    `beside` is a folder for what a cache that may not be written lacks of this config (`cache.write_manifest`).

    Where the sources are not on this machine, a cache that was prepared for the same config elsewhere is enough.
    """
    check(config)
    started = time.monotonic()
    cache.fetch(config, cache_dir)
    folder = cache.local_folder(cache_dir)
    paths.make_directory(str(folder))
    written: list[dict[str, Any]] = []
    found: Parts | None = None
    try:
        with workers.Pool(config.workers or cores()) as pool:
            found, manifest, written = _write(config, cache_dir, pool, report, tokenizer)
        cache.write_manifest(config, cache_dir, manifest, beside=beside)
    except sources.MissingSource:
        if cache.find_manifest(config, cache_dir, beside) is None:
            raise
        manifest = cache.read_manifest(config, cache_dir, beside=beside)
    return prepared(manifest, folder, found, written, started)


def check(config: DataConfig) -> None:
    preprocessors.check(config.preprocessors, config.fields)
    if config.extra_ids < 0:
        raise UsageError(f"config.data.extra_ids={config.extra_ids} should be at least 0; T5 has 100")
    if config.workers < 0:
        raise UsageError(f"config.data.workers={config.workers} should be at least 0, which is one for each core")
    if not config.tokenizer:
        raise UsageError("config.data.tokenizer is empty; give bytes, a path, or train:bpe:SIZE")
    if config.tokenizer_training_bytes < 1:
        raise UsageError(f"config.data.tokenizer_training_bytes={config.tokenizer_training_bytes} should be at least 1")


def prepared(
    manifest: cache.Manifest, folder: pathlib.Path, found: Parts | None, written: list[dict[str, Any]], started: float
) -> Prepared:
    entries = [*manifest.train.values(), *manifest.validation.values()]
    indexes = [token_set.read_index(folder / entry.folder) for entry in entries]
    totals = [sum(index[key] for index in indexes) for key in ("documents", "tokens", "text_bytes", "skipped")]
    return Prepared(
        manifest,
        {} if found is None else {name: part.content for name, part in found.train.items()},
        *totals,
        empty_files=sum(index.get("empty_files", 0) for index in indexes),
        bad=sum(index.get("bad", {"count": 0})["count"] for index in indexes),
        bad_places=tuple(_bad_places(entries, indexes)),
        shards_written=len(written),
        text_bytes_written=sum(shard["text_bytes"] for shard in written),
        seconds=time.monotonic() - started,
    )


def _bad_places(entries: list[cache.SetEntry], indexes: list[dict[str, Any]]) -> list[str]:
    found: list[str] = []
    for entry, index in zip(entries, indexes, strict=True):
        found += bad_records.lines(index, entry.source.partition(":")[0], entry.files)
    return found[: bad_records.FIRST]


def _write(
    config: DataConfig, cache_dir: str, pool: workers.Pool, report: Report | None, saved: str
) -> tuple[Parts, cache.Manifest, list[dict[str, Any]]]:
    """Writes what is missing; (text, manifest, facts of the shards written)."""
    folder = cache.local_folder(cache_dir)
    found, tokenizer, plans = plan(config, folder, pool, report, saved)
    for each in plans:
        cache.fetch_set(cache_dir, each.place.name)
    written = _write_sets(config, plans, pool, report)
    return found, manifest_of(config, folder, found, tokenizer, plans, pool), written


def plan(
    config: DataConfig,
    folder: pathlib.Path,
    pool: workers.Pool,
    report: Report | None,
    saved: str,
    share: memory.Share | None = None,
) -> tuple[Parts, str, list[SetPlan]]:
    """(text, the tokenizer's folder, the token sets to train on and those held out)."""
    found = parts.find(config, folder, pool, share)
    tokenizer = chosen_tokenizer.place(config, folder, found, report, saved)
    given = [*found.train.values(), *found.validation.values()]
    return found, tokenizer, _plan_sets(config, folder, given, tokenizer)


def manifest_of(
    config: DataConfig,
    folder: pathlib.Path,
    found: Parts,
    tokenizer: str,
    plans: list[SetPlan],
    pool: workers.Pool,
) -> cache.Manifest:
    """Of sets that are all written."""
    train, folders = list(found.train.values()), [plan.place.name for plan in plans]
    rates: dict[str, float] = {}
    if _is_task_mixture(config, train):
        counts = [token_set.read_index(folder / name)["documents"] for name in folders[: len(train)]]
        rates = parts.task_rates(train[0].source, dict(zip(found.train, counts, strict=True)), folder, pool)
    entries = {
        name: cache.SetEntry(place, str(part.source), tuple(file.path for file in part.files), rates.get(name))
        for place, (name, part) in zip(folders, found.train.items(), strict=False)
    }
    held_out = {
        name: cache.SetEntry(place, str(part.source), tuple(file.path for file in part.files), None)
        for place, (name, part) in zip(folders[len(train) :], found.validation.items(), strict=True)
    }
    _check_shares(config, [*entries.values(), *held_out.values()], folder)
    chat = chats.job(config, encoding.load_vocabulary(str(folder / tokenizer)))
    return cache.Manifest(tokenizer, entries, held_out, chat_template=chat.get("template", ""))


def _check_shares(config: DataConfig, entries: list[cache.SetEntry], folder: pathlib.Path) -> None:
    """UserError for a source with more bad records than config.data.max_bad_share allows."""
    by_source: dict[str, list[tuple[dict[str, Any], tuple[str, ...]]]] = {}
    for entry in entries:
        by_source.setdefault(entry.source, []).append((token_set.read_index(folder / entry.folder), entry.files))
    for source, sets in by_source.items():
        bad_records.check_share(source, sets, config.max_bad_share)


def _is_task_mixture(config: DataConfig, train: list[Part]) -> bool:
    """Whether the rates are those of a SeqIO mixture (config.data.mixture has its own)."""
    return bool(config.source) and len(train) > 1


# Token sets.


def _plan_sets(config: DataConfig, folder: pathlib.Path, given: list[Part], tokenizer: str) -> list[SetPlan]:
    """The token set of each part; makes their folders."""
    vocabulary = encoding.load_vocabulary(str(folder / tokenizer))
    kind = token_shards.token_type(vocabulary.size)
    chat = chats.job(config, vocabulary)
    plans = []
    for part in given:
        fingerprint = cache.digest(
            [
                token_shards.VERSION,
                part.content,
                part.begin,
                part.end,
                part.task,
                parts.reading(config, part),
                vocabulary.fingerprint,
                *([chat] if chat and part.source.kind not in ("text", "lines") else []),
                *(["joined"] if config.joined and not chat and vocabulary.adds_space else []),
            ]
        )
        place = folder / f"tokens-{fingerprint[:16]}"
        paths.make_directory(str(place))
        function, jobs = _jobs(config, part, place, str(folder / tokenizer), kind, chat)
        weight = sum(file.size for file in part.files) / max(sum(file.measure for file in part.files), 1)
        unit = sources.unit(part.source.kind)
        plans.append(SetPlan(place, fingerprint, unit, kind, function, jobs, weight, part, config))
    return plans


def _write_sets(
    config: DataConfig, plans: list[SetPlan], pool: workers.Pool, report: Report | None
) -> list[dict[str, Any]]:
    """Writes the shards that are missing, and the indexes; facts of the shards written."""
    for plan in plans:
        token_shards.remove_leftovers(plan.place)
    written = run_jobs([job for plan in plans for job in plan.todo()], pool, config.workers, report)
    for plan in plans:
        token_shards.remove_leftovers(plan.place)  # of a killed writer that was still in the kernel at the start
        plan.write_index([facts for facts in plan.facts() if facts])
    return written


def _jobs(
    config: DataConfig, part: Part, place: pathlib.Path, tokenizer: str, kind: str, chat: dict[str, Any]
) -> tuple[str, list[dict[str, Any]]]:
    """(worker function, one job a shard)."""
    job: dict[str, Any] = {"folder": str(place), "tokenizer": tokenizer, "token_type": kind}
    job |= {"chat": chat, "columns": config.columns, "joined": config.joined}
    if part.task is not None:
        named = {"module": part.source.path, "name": f"{part.task['task']}:{part.task['split']}"}
        named |= {"files": [file.path for file in part.files], "on_bad_record": config.on_bad_record}
        shards = range(part.task["shards"])
        return "encode_task_shard", [
            {**job, **named, "index": shard, "shard": shard, "shards": len(shards)} for shard in shards
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
        "separator": config.separator,
        "on_bad_record": config.on_bad_record,
    }
    return "encode_shards", [
        {
            **job,
            "index": index,
            "pieces": [dataclasses.astuple(piece) for piece in group],
            "size": sum(piece.end - piece.begin for piece in group),
        }
        for index, group in enumerate(groups)
    ]


def _joined(function: str, jobs: list[dict[str, Any]], part: Part) -> list[dict[str, Any]]:
    """The jobs of missing shards, those joined that would read much of a file again (`sources.chains`)."""
    if function != "encode_shards":
        return jobs
    groups = [[sources.Piece(*piece) for piece in job["pieces"]] for job in jobs]
    return [
        {name: value for name, value in jobs[chain[0]].items() if name != "pieces"}
        | {
            "shards": [(jobs[index]["index"], jobs[index]["pieces"]) for index in chain],
            "size": sum(jobs[index]["size"] for index in chain),
        }
        for chain in sources.chains(part.files, groups)
    ]


def _notes(config: DataConfig, part: Part, shards: list[dict[str, Any]]) -> dict[str, Any]:
    """What an index says of bad records and of empty files, where there are any."""
    if config.on_bad_record == "stop":
        bad_records.check_none(shards, part.source.kind, [file.path for file in part.files])
    empty = sum(not file.measure for file in part.files) if part.begin == 0 else 0
    return bad_records.total(shards) | ({"empty_files": empty} if empty else {})


def run_jobs(
    todo: list[tuple[str, dict[str, Any], float]], pool: workers.Pool, size: int, report: Report | None
) -> list[dict[str, Any]]:
    """Runs jobs, few small ones in this process; the facts of their shards."""
    native = [(job, weight) for function, job, weight in todo if function == "encode_shards"]
    tasks = [job for function, job, _ in todo if function == "encode_task_shard"]
    total = int(sum(job["size"] * weight for job, weight in native))
    read, examples = 0.0, 0

    def tell_bytes(weight: float, amount: int) -> None:
        nonlocal read
        read += amount * weight
        if report is not None:
            report(Writing("bytes", int(read), total))

    def tell_examples(index: int, amount: int) -> None:
        nonlocal examples
        examples += amount
        if report is not None:
            report(Writing("examples", examples, None))

    if native and (size == 1 or total < _INLINE_BYTES):
        written = [
            encoding.encode_shards(job, lambda amount, weight=weight: tell_bytes(weight, amount))
            for job, weight in native
        ]
    else:
        jobs = [job for job, _ in native]
        written = pool.run("encode_shards", jobs, lambda index, amount: tell_bytes(native[index][1], amount))
    return [facts for shards in written for facts in shards] + pool.run("encode_task_shard", tasks, tell_examples)
