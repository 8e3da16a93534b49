"""The small texts that come with the program, found from any folder."""

import os
import pathlib

_FOLDER = pathlib.Path(__file__).resolve().parents[1] / "data"


def bundled(name: str) -> str:
    """The path of a file of configs/data: as the checkout has it for who stands there, else in full."""
    short = f"configs/data/{name}"
    return short if os.path.isfile(short) else str(_FOLDER / name)
