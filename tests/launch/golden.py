"""Whole documents of launchers, compared with files; T5X_LIKE_UPDATE_GOLDEN=1 writes them."""

import os
import pathlib

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "golden" / "launch"


def equals_golden(name: str, text: str) -> None:
    """Asserts that `text` is what the file of that name holds."""
    path = FOLDER / name
    if os.environ.get("T5X_LIKE_UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")
