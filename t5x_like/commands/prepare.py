"""`t5x_like prepare --config=FILE --workdir=DIR`: tokenizes the data of a config into its cache, in processes.

    t5x_like prepare --config=configs/pretrain/tiny.py --workdir=runs/tiny
    t5x_like prepare --config=... --config.data.cache=gs://BUCKET/cache

`train` does the same when it starts, so this is for data that takes long, or a machine that is cheaper. Killed and
started again it goes on with the shards that are missing.
"""

import sys
from collections.abc import Sequence
from typing import Any

from t5x_like.commands.arguments import Parser, load_config, split_config
from t5x_like.core.config import build
from t5x_like.core.errors import UsageError
from t5x_like.core.terminal import Progress, StatusLine, format_bytes, format_count


def run(arguments: Sequence[str]) -> int:
    config_arguments, others = split_config(arguments)
    parser = Parser(prog="t5x_like prepare", description=__doc__)
    parser.add_argument("--workdir", default="", help="folder of the run; needed unless config.data.cache is given")
    options = parser.parse_args(others)
    config, _ = load_config(config_arguments)

    from t5x_like.data.config import DataConfig
    from t5x_like.storage import paths

    data = build(DataConfig, config["data"], path="config.data")
    if not (data.cache or options.workdir):
        raise UsageError("t5x_like prepare: give --workdir=DIR, or --config.data.cache=DIR")
    cache_dir = data.cache or paths.join(paths.normal(options.workdir), "cache")
    print(summary(show_progress(data, cache_dir), cache_dir))
    return 0


def show_progress(data: Any, cache_dir: str) -> Any:
    """Makes the token cache of a DataConfig complete, and shows how far it is."""
    from t5x_like.data.write.prepare import Training, Writing, prepare

    shown: dict[str, Progress] = {}

    def report(state: Training | Writing) -> None:
        if isinstance(state, Training):
            text = f"a tokenizer of {state.size} tokens on up to {format_bytes(state.text_bytes)} of text"
            StatusLine(sys.stderr).print(f"prepare: training {text} ...")
            return
        if state.unit not in shown:
            end()
            shown[state.unit] = Progress(state.total, label="prepare", unit=state.unit)
        shown[state.unit].update(state.done)

    def end() -> None:
        while shown:
            shown.popitem()[1].close()

    try:
        return prepare(data, cache_dir, report=report)
    finally:
        end()


def summary(done: Any, cache_dir: str) -> str:
    rate = f", {done.text_bytes_written / 1e6 / done.seconds:.1f} MB/s of text" if done.shards_written else ""
    rate = rate or " (all there already)"
    sets = [*done.manifest.train.items(), *done.manifest.validation.items()]
    lines = [f"  {name:<12} {entry.folder}  {entry.source}" for name, entry in sets]
    skipped = f", {done.skipped} documents without a token" if done.skipped else ""
    return "\n".join(
        [
            f"{cache_dir}: {format_count(done.tokens)} tokens of {format_count(done.documents)} documents, "
            f"{format_bytes(done.text_bytes)}{skipped}; {done.seconds:.1f} s{rate}",
            *lines,
            f"  tokenizer    {done.manifest.tokenizer}",
        ]
    )
