"""`t5x_like prepare --config=FILE --workdir=DIR`: tokenizes the data of a config into its cache, in processes.

    t5x_like prepare --config=configs/pretrain/tiny.py --workdir=runs/tiny
    t5x_like prepare --config=... --config.data.cache=gs://BUCKET/cache

`train` does the same when it starts, so this is for data that takes long, or a machine that is cheaper. Killed and
started again it goes on with the shards that are missing.
"""

from collections.abc import Sequence
from typing import Any

from t5x_like.core.config import build
from t5x_like.core.errors import UsageError
from t5x_like.core.terminal import format_bytes, format_count
from t5x_like.runs.arguments import Parser, load_config, split_config


def run(arguments: Sequence[str]) -> int:
    config_arguments, others = split_config(arguments)
    parser = Parser(prog="t5x_like prepare", description=__doc__)
    parser.add_argument("--workdir", default="", help="folder of the run; needed unless config.data.cache is given")
    options = parser.parse_args(others)
    config, _ = load_config(config_arguments)

    from t5x_like.data.config import DataConfig
    from t5x_like.data.read import features
    from t5x_like.data.read.loader import cuts
    from t5x_like.data.write.progress import show_progress
    from t5x_like.storage import paths

    data = build(DataConfig, config["data"], path="config.data")
    if not (data.cache or options.workdir):
        raise UsageError("t5x_like prepare: give --workdir=DIR, or --config.data.cache=DIR")
    cache_dir = data.cache or paths.join(paths.normal(options.workdir), "cache")
    features.check(data)
    print(summary(show_progress(data, cache_dir), cache_dir))
    for name, cut in cuts(data, cache_dir=cache_dir).items():
        print(f"  {name:<12} {cut} (config.data.truncate)")
    return 0


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
