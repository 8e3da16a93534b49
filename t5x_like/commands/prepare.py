"""`t5x_like prepare --config=FILE --workdir=DIR`: tokenizes the data of a config into its cache, in processes.

    t5x_like prepare --config=configs/pretrain/tiny.py --workdir=runs/tiny
    t5x_like prepare --config=... --config.data.cache=gs://BUCKET/cache
    t5x_like prepare --config=... --config.data.cache=gs://BUCKET/cache --part=3/8   on several machines, then
    t5x_like prepare --config=... --config.data.cache=gs://BUCKET/cache --finish     on one

`train` does the same when it starts, so this is for data that takes long, or a machine that is cheaper. Killed and
started again it goes on with the shards that are missing.
"""

import functools
from collections.abc import Sequence
from typing import Any

from t5x_like.core.config import build
from t5x_like.core.errors import UsageError
from t5x_like.core.terminal import format_bytes, format_count
from t5x_like.runs.arguments import ConfigParser, load_config, split_config


def run(arguments: Sequence[str]) -> int:
    config_arguments, others = split_config(arguments)
    parser = ConfigParser(prog="t5x_like prepare", description=__doc__)
    parser.add_argument("--workdir", default="", help="folder of the run; needed unless config.data.cache is given")
    parser.add_argument("--part", default="", metavar="I/N", help="write part I of N (from 1) of a shared cache alone")
    parser.add_argument("--finish", action="store_true", help="check that all parts are there and complete the cache")
    options = parser.parse_args(others)
    config, _ = load_config(config_arguments)

    from t5x_like.data.config import DataConfig
    from t5x_like.data.read import features
    from t5x_like.data.read.loader import cuts
    from t5x_like.data.write.prepare_parts import finish, prepare_part
    from t5x_like.data.write.progress import show_progress
    from t5x_like.storage import paths

    data = build(DataConfig, config["data"], path="config.data")
    if not (data.cache or options.workdir):
        raise UsageError("t5x_like prepare: give --workdir=DIR, or --config.data.cache=DIR")
    beside = paths.join(paths.normal(options.workdir), "cache") if options.workdir else ""
    cache_dir = data.cache or beside
    features.check(data)
    if options.part:
        if options.finish:
            raise UsageError("t5x_like prepare: give --part=I/N or --finish, not both; finish when all parts are done")
        part, count = _part(options.part)
        done = show_progress(
            data, cache_dir, run=lambda report: prepare_part(data, cache_dir, part, count, report=report)
        )
        print(
            f"{cache_dir}: part {part} of {count} is there: {done.shards} of {done.total} shards, {done.written} of "
            "them written now; when all parts are, run it with --finish"
        )
        return 0
    if options.finish:
        done = show_progress(data, cache_dir, run=functools.partial(finish, data, cache_dir))
    else:
        done = show_progress(data, cache_dir, beside=beside)
    print(summary(done, cache_dir))
    for name, cut in cuts(data, cache_dir=cache_dir, beside=beside).items():
        print(f"  {name:<12} {cut} (config.data.truncate)")
    return 0


def _part(text: str) -> tuple[int, int]:
    part, _, count = text.partition("/")
    if not (part.isdecimal() and count.isdecimal() and 1 <= int(part) <= int(count)):
        raise UsageError(f"t5x_like prepare: --part={text} should be I/N, such as 1/8 to 8/8")
    return int(part), int(count)


def summary(done: Any, cache_dir: str) -> str:
    rate = f", {done.text_bytes_written / 1e6 / done.seconds:.1f} MB/s of text" if done.shards_written else ""
    rate = rate or " (all there already)"
    sets = [*done.manifest.train.items(), *done.manifest.validation.items()]
    lines = [f"  {name:<12} {entry.folder}  {entry.source}" for name, entry in sets]
    skipped = f", {done.skipped} documents without a token" if done.skipped else ""
    skipped += f", {done.bad} bad records left out" if done.bad else ""
    skipped += f", {done.empty_files} empty files" if done.empty_files else ""
    return "\n".join(
        [
            f"{cache_dir}: {format_count(done.tokens)} tokens of {format_count(done.documents)} documents, "
            f"{format_bytes(done.text_bytes)}{skipped}; {done.seconds:.1f} s{rate}",
            *lines,
            f"  tokenizer    {done.manifest.tokenizer}",
        ]
    )
