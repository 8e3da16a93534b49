"""`t5x_like inspect DIR`: what a model directory holds; with `--step=N`, the documents that step N of the run reads.

    t5x_like inspect runs/tiny                    parameters, shapes, axes, sizes, and how they were made
    t5x_like inspect runs/tiny --checkpoint=100   of an older checkpoint
    t5x_like inspect runs/tiny --step=37          where each document in the batch of step 37 lies: `document` in its
                                                  file, `text from` the place in its text that the row reads from
    t5x_like inspect runs/tiny --goodput          where the wall clock went, over all starts; --json for programs

All but --step read no array and build no model.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from t5x_like.core.errors import UsageError, UserError
from t5x_like.core.terminal import format_bytes, format_count, format_duration
from t5x_like.runs.arguments import Parser
from t5x_like.storage import model_directory, paths, patterns
from t5x_like.training import goodput
from t5x_like.training.starts import read as read_starts

_MODELS = ("params", "ema")
_LEFT = ("path", "shape", "axes", "dtype", "kind")


def run(arguments: Sequence[str]) -> int:
    parser = Parser(prog="t5x_like inspect", description=__doc__)
    parser.add_argument("directory", help="workdir, one checkpoint of it, or converted model")
    parser.add_argument("--checkpoint", type=int, help="step of the checkpoint to describe (default: the newest)")
    parser.add_argument("--step", type=int, help="name the documents in the batch of this step, from 1")
    parser.add_argument("--goodput", action="store_true", help="where the wall clock of all starts went")
    parser.add_argument("--json", action="store_true", help="with --goodput: as one JSON object")
    options = parser.parse_args(arguments)
    if options.step is not None and options.checkpoint is not None:
        raise UsageError("t5x_like inspect: --step is about data and --checkpoint about parameters; give one of them")
    if options.goodput and (options.step is not None or options.checkpoint is not None):
        raise UsageError("t5x_like inspect: --goodput is about all starts of a run; give it without the others")
    if options.json and not options.goodput:
        raise UsageError("t5x_like inspect: --json goes with --goodput")
    directory = patterns.one(options.directory, what="DIR=")
    if options.goodput:
        described = spent(directory, as_json=options.json)
    elif options.step is None:
        described = describe(directory, options.checkpoint)
    else:
        described = documents(directory, options.step)
    for line in described:
        print(line)
    return 0


def describe(directory: str, step: int | None = None) -> Iterator[str]:
    """The lines about a checkpoint: a table of its parameters, the other items, and its provenance."""
    found = model_directory.locate(directory, step=step)
    note = model_directory.read_metadata(found.checkpoint)
    saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(note["time"]))
    yield f"{found.checkpoint}  (step {note['step']}, saved {saved})"
    if "base" in note:
        yield f"the trained part alone; its base is {note['base']['directory']}"
    others = [other for other in found.steps if other != note["step"]]
    if others:
        yield f"other checkpoints: {', '.join(map(str, others))}"
    for name in _MODELS:
        if name in note["arrays"]:
            yield ""
            yield from _table(name, _rows(name, note))
    yield ""
    for name, arrays in note["arrays"].items():
        if name not in _MODELS:
            yield f"{name}: {len(arrays)} arrays, {format_bytes(sum(map(_bytes, arrays.values())))}"
    for title in ("metrics", "provenance"):
        if note.get(title):
            yield ""
            yield title
            for name, value in _flat(note[title]):
                yield f"  {name:<28} {value}"


def documents(directory: str, step: int) -> Iterator[str]:
    """The lines about the batch of a step: each document's place in the batch and in its source."""
    if step < 1:
        raise UsageError(f"--step={step} should be at least 1: rows of metrics.jsonl are counted from 1")
    # Imported here: they need jax, the description of a checkpoint does not.
    from t5x_like.data.read.loader import open_data
    from t5x_like.runs import train as experiments
    from t5x_like.storage import manifest, workdir

    config = workdir.read_config(directory)
    if config is None:
        raise UserError(f"{directory} holds no config.json; --step needs the workdir of a run")
    experiment = experiments.from_config(config)
    if step > experiment.loop.steps:
        raise UsageError(f"--step={step}: the run in {directory} has {experiment.loop.steps} steps (config.loop.steps)")
    beside = paths.join(paths.normal(directory), "cache")
    cache = experiment.data.cache or beside
    data = open_data(experiment.data, cache_dir=cache, seed=experiment.seed, beside=beside)
    try:
        starts = manifest.read(paths.normal(directory))["starts"]
        if not starts:
            raise UserError(f"{directory} holds no start in {manifest.NAME}, which names its data; restore it")
        if starts[-1].get("data") != data.fingerprint:
            raise UserError(f"{cache} holds other data than {directory} was trained on; restore the cache of the run")
        # Update N trains on batch N - 1 of the loader.
        places = data.documents(step - 1)
    finally:
        data.close()
    yield f"{directory}: {len(places)} documents in the batch of step {step}"
    rows = [
        [
            str(place.row),
            str(place.column),
            place.component,
            f"{place.offset} {place.unit}",
            f"{place.text_byte} byte",
            str(place.epoch),
            place.file,
        ]
        for place in places
    ]
    yield from _columns([["row", "column", "component", "document", "text from", "epoch", "file"], *rows], left=(2, 6))


def spent(directory: str, *, as_json: bool = False) -> Iterator[str]:
    """The lines about where the wall clock went: parts in seconds and shares, then every start."""
    starts = read_starts(directory)
    if not starts:
        raise UserError(f"{directory} holds no start of a run; give the workdir of one")
    found = goodput.account(starts)
    if as_json:
        yield json.dumps(found.as_json(), indent=2)
        return
    began, ended = (time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(t)) for t in (found.began, starts[-1].ended))
    yield f"{directory}: {found.goodput:.1%} goodput, {began} to {ended} ({format_duration(found.wall)})"
    yield ""
    said = {**goodput.PARTS, **goodput.DERIVED}
    rows = [
        [name, f"{value:.1f}", f"{value / max(found.wall, 1e-9):.1%}", said[name]]
        for name, value in found.seconds.items()
    ]
    total = ["all", f"{found.wall:.1f}", "100.0%", "from the first start to the last line of the record"]
    yield from _columns([["part", "seconds", "share", ""], *rows, total], left=(0, 3))
    yield ""
    yield from _columns([list(_START), *(list(_cells(row)) for row in found.rows)], left=(1, len(_START) - 1))
    if found.lost_steps:
        yield ""
        yield f"{found.lost_steps} steps were lost: done, and done again by a later start from a checkpoint before them"
    if not all(row["recorded"] for row in found.rows):
        yield ""
        yield "of starts that are not in goodput.jsonl there are the rows that were kept: what came before them is"
        yield "partly missing, and lost steps, idle time and starting again cannot be told apart (unknown)"


_START = ("start", "begun", "steps", "seconds", "productive", "lost", "lost steps", "idle before", "ended")


def _cells(row: Mapping[str, Any]) -> Iterator[str]:
    yield str(row["number"])
    yield time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["began"]))
    yield "-" if row["first_step"] is None else f"{row['first_step']} to {row['last_step']}"
    yield f"{sum(row['seconds'].values()):.1f}"
    yield f"{row['productive']:.1f}"
    yield f"{row['lost']:.1f}"
    yield str(row["lost_steps"])
    yield "?" if row["idle_before"] is None else f"{row['idle_before']:.1f}"
    yield str(row["ended"])[:60]


def _rows(item: str, note: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each leaf: a weight in several parts is one, with its logical shape and the bytes of all parts."""
    axes = note.get("axes", {}).get(item, {})
    rows = {}
    for path, array in note["arrays"][item].items():
        rows[path] = {"shape": array["shape"], "dtype": array["dtype"], "kind": "array", "bytes": _bytes(array)}
    for path, record in note["kinds"].get(item, {}).items():
        parts = [rows.pop(name) for name in list(rows) if name.startswith(f"{path}/")]
        dtypes = "+".join(dict.fromkeys(part["dtype"] for part in parts))
        size = sum(part["bytes"] for part in parts)
        rows[path] = {"shape": record["shape"], "dtype": dtypes, "kind": record["kind"], "bytes": size}
        axes = {**axes, path: record["axes"]}
    return [
        {"path": path, "axes": axes.get(path), "size": math.prod(row["shape"]), **row}
        for path, row in sorted(rows.items())
    ]


def _table(item: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    total, size = sum(row["size"] for row in rows), sum(row["bytes"] for row in rows)
    yield f"{item}: {format_count(total)} parameters ({total:,}) in {len(rows)} arrays, {format_bytes(size)}"
    cells = [[*_LEFT, "parameters", "bytes"]]
    for row in rows:
        axes = "?" if row["axes"] is None else " ".join(name or "-" for name in row["axes"]) or "-"
        shape = "x".join(map(str, row["shape"])) or "scalar"
        cells.append(
            [row["path"], shape, axes, row["dtype"], row["kind"], f"{row['size']:,}", format_bytes(row["bytes"])]
        )
    yield from _columns(cells, left=range(len(_LEFT)))


def _columns(cells: Sequence[Sequence[str]], *, left: Sequence[int] | range) -> Iterator[str]:
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        padded = [
            text.ljust(width) if column in left else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield f"  {'  '.join(padded)}".rstrip()


def _bytes(array: Mapping[str, Any]) -> int:
    return math.ceil(math.prod(array["shape"]) * _bits(array["dtype"]) / 8)


def _bits(dtype: str) -> int:
    """The bits of one element, from the digits that every dtype's name but bool's holds.

    >>> _bits("bfloat16"), _bits("int4"), _bits("float8_e4m3fn"), _bits("bool")
    (16, 4, 8, 8)
    """
    digits = "".join(char if char.isdigit() else " " for char in dtype.partition("_")[0]).split()
    return int(digits[0]) if digits else 8


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
