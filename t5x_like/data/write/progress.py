"""`prepare` with its progress on the terminal, for whoever starts it there."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

from t5x_like.core.terminal import Progress, StatusLine, format_bytes
from t5x_like.data.config import DataConfig
from t5x_like.data.write.chosen_tokenizer import Training
from t5x_like.data.write.prepare import Prepared, Writing, prepare


def show_progress(
    config: DataConfig,
    cache_dir: str,
    *,
    tokenizer: str = "",
    beside: str = "",
    run: Callable[..., Any] | None = None,
) -> Any:
    """Makes the token cache of a config complete, and shows on stderr how far it is. `tokenizer` and `beside` as in
    `prepare`.
    `run`: what is done instead; its result."""
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
        if run is not None:
            done = run(report=report)
        else:
            done = prepare(config, cache_dir, report=report, tokenizer=tokenizer, beside=beside)
    finally:
        end()
    for line in left_out(done) if isinstance(done, Prepared) else ():
        StatusLine(sys.stderr).print(f"prepare: {line}")
    return done


def left_out(done: Prepared) -> Iterator[str]:
    """What of the sources is not in the cache, and the places of the first bad records."""
    if done.empty_files:
        yield f"{done.empty_files} empty files"
    if done.bad:
        yield f"{done.bad} bad records are left out (config.data.on_bad_record=skip); the first:"
        yield from (f"  {place}" for place in done.bad_places)
