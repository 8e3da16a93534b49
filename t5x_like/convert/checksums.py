"""SHA256SUMS of a folder, as `sha256sum` writes it: made of all its files, and compared where a model is read whole."""

import hashlib
import os

from t5x_like.core.errors import UserError
from t5x_like.storage import paths

NAME = "SHA256SUMS"
_BLOCK = 1 << 20


def write(folder: str) -> None:
    """Of every file that is in the folder now."""
    names = sorted(name for name in os.listdir(folder) if name != NAME)
    lines = "".join(f"{digest(os.path.join(folder, name))}  {name}\n" for name in names)
    paths.write_text_atomic(os.path.join(folder, NAME), lines)


def check(folder: str) -> None:
    """Raises UserError for a file that is not what SHA256SUMS says, if the folder has one."""
    place = os.path.join(folder, NAME)
    if not os.path.isfile(place):
        return
    for number, line in enumerate(paths.read_bytes(place).decode(errors="replace").splitlines(), 1):
        expected, _, name = line.partition(" ")
        name = name.lstrip(" *")
        if len(expected) != 64 or os.path.basename(name) != name or not name:
            raise UserError(f"{place}:{number}: {line[:80]!r} is no sha256 and file name; copy the folder again")
        file = os.path.join(folder, name)
        if not os.path.isfile(file):
            raise UserError(f"{file}: no such file, though {NAME} names it; copy the folder again")
        if digest(file) != expected:
            raise UserError(
                f"{file} is not what {NAME} says (sha256); copy it again, or remove {NAME} if you changed the file"
            )


def digest(file: str) -> str:
    found = hashlib.sha256()
    with open(file, "rb") as content:
        while block := content.read(_BLOCK):
            found.update(block)
    return found.hexdigest()
