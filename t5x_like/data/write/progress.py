"""`prepare` with its progress on the terminal, for whoever starts it there."""

import sys
from collections.abc import Callable
from typing import Any

from t5x_like.core.terminal import Progress, StatusLine, format_bytes
from t5x_like.data.config import DataConfig
from t5x_like.data.write.prepare import Training, Writing, prepare


def show_progress(
    config: DataConfig, cache_dir: str, *, tokenizer: str = "", run: Callable[..., Any] | None = None
) -> Any:
    """Makes the token cache of a config complete, and shows on stderr how far it is. `tokenizer` as in `prepare`.
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
        return run(report=report) if run is not None else prepare(config, cache_dir, report=report, tokenizer=tokenizer)
    finally:
        end()
