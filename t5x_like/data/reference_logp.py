"""Log-probabilities of the answers of pairs by a reference model: computed once, kept beside the tokens.

A folder `reference-KEY` of the token cache holds those of one token set. KEY is a hash of the tokens, of what decides
the rows that are read of them, and of the model; so other data or another model is another folder, and what was made
for them stays. `about.json` says what the numbers are. They are float32, two a row (chosen, rejected) in the order of
the reader's rows, in parts of a fixed number of rows, each of which appears whole; `index.json`, written last, declares
them complete. Numbers that are there are never written again: two runs that share a cache read the same ones.

A cache that may not be written keeps nothing: the folder then lies `beside` it, in the run's workdir. In a bucket the
parts are copied to as they are made, and read from a local disk.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from t5x_like.core.errors import UserError
from t5x_like.core.types import ArraySpec
from t5x_like.data import cache
from t5x_like.data.config import DataConfig
from t5x_like.storage import paths

VERSION = 1
PART = 4096  # rows
NAME = "reference_logp"
SIDES = ("chosen", "rejected")
_ABOUT, _INDEX = "about.json", "index.json"
_TYPE = np.dtype("<f4")


def arrays(config: DataConfig) -> dict[str, ArraySpec]:
    """What a batch of pairs has more where these numbers are read."""
    return {f"{side}/{NAME}": ArraySpec((config.batch_size,), "float32", ("batch",)) for side in SIDES}


def of_rows(numbers: Float[np.ndarray, "rows 2"] | None, rows: Int[np.ndarray, "n"]) -> dict[str, np.ndarray]:
    """These arrays of some rows; {} without numbers."""
    if numbers is None:
        return {}
    return {f"{side}/{NAME}": numbers[rows, column] for column, side in enumerate(SIDES)}


def about(config: DataConfig, *, tokens: str, rows: int, model: Mapping[str, str]) -> dict[str, Any]:
    """What numbers are of. tokens: the fingerprint of their token set; model: what tells models apart."""
    read = {name: getattr(config, name) for name in ("length", "encoder_length", "start_token")}
    read["truncate"] = dataclasses.astuple(config.truncate)
    return paths.as_json({"version": VERSION, "tokens": tokens, "rows": rows, "read": read, "model": dict(model)})


class Store:
    """The numbers that `about` describes, in a cache; one process writes, any number read after it."""

    def __init__(self, about: Mapping[str, Any], cache_dir: str, *, beside: str):
        self._about, self._cache, self._name = about, cache_dir, f"reference-{cache.digest(about)[:16]}"
        self._beside, self.rows = paths.join(beside, self._name), int(about["rows"])
        self._local = str(cache.local_folder(cache_dir) / self._name)
        self.parts = -(-self.rows // PART)

    def missing(self) -> list[int]:
        """The parts that are still to be made."""
        cache.fetch_part(self._cache, self._name)
        folder = self._complete()
        if folder is not None:
            return []
        folder = self._writable()
        return [part for part in range(self.parts) if not self._is_whole(folder, part)]

    def rows_of(self, part: int) -> range:
        return range(part * PART, min((part + 1) * PART, self.rows))

    def write(self, part: int, numbers: Float[np.ndarray, "n 2"]) -> None:
        """A part, unless it is there by now."""
        folder, rows = self._writable(), self.rows_of(part)
        if numbers.shape != (len(rows), 2) or not np.isfinite(numbers).all():
            raise UserError(
                f"{folder}: the reference gives no finite log-probabilities for rows {rows.start} to {rows.stop - 1}; "
                "check its parameters (config.roles.reference.source) and dtype"
            )
        if not self._is_whole(folder, part):
            paths.write_bytes_atomic(paths.join(folder, _part(part)), np.ascontiguousarray(numbers, _TYPE).tobytes())
        self._send(folder, _part(part))

    def finish(self) -> None:
        """Declares the numbers complete, after the last part."""
        if self._complete() is None:
            folder = self._writable()
            sums = [hashlib.sha256(paths.read_bytes(paths.join(folder, _part(n)))).hexdigest() for n in self._each]
            paths.write_json_if_other(paths.join(folder, _INDEX), {**self._about, "sha256": sums})
            self._send(folder, _INDEX)

    def read(self) -> Float[np.ndarray, "rows 2"]:
        """All numbers. UserError where they are damaged."""
        cache.fetch_part(self._cache, self._name)
        folder = self._complete()
        if folder is None:
            raise UserError(f"{self._local}: log-probabilities of the reference are not complete; start again")
        sums, found = paths.read_json(paths.join(folder, _INDEX))["sha256"], []
        for part, expected in zip(self._each, sums, strict=True):
            path = paths.join(folder, _part(part))
            content = paths.read_bytes(path)
            if hashlib.sha256(content).hexdigest() != expected:
                raise UserError(f"{path}: its sha256 is not the one in {_INDEX}; delete {folder} and start again")
            found.append(np.frombuffer(content, _TYPE).reshape(-1, 2))
        return np.concatenate(found).astype(np.float32)

    @property
    def _each(self) -> range:
        return range(self.parts)

    def _complete(self) -> str | None:
        """The folder in which all numbers are."""
        return next((f for f in (self._local, self._beside) if paths.exists(paths.join(f, _INDEX))), None)

    def _writable(self) -> str:
        """The folder that parts are written to: where the cache may not be written, that beside it."""
        try:
            paths.write_json_if_other(paths.join(self._local, _ABOUT), dict(self._about))
        except UserError:
            paths.write_json_if_other(paths.join(self._beside, _ABOUT), dict(self._about))
            return self._beside
        return self._local

    def _is_whole(self, folder: str, part: int) -> bool:
        path = paths.join(folder, _part(part))
        return paths.exists(path) and paths.size(path) == 2 * _TYPE.itemsize * len(self.rows_of(part))

    def _send(self, folder: str, file: str) -> None:
        if folder == self._local:
            cache.send_file(self._cache, self._name, file)


def _part(number: int) -> str:
    return f"part-{number:05d}.f32"
