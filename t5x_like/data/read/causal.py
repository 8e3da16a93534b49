"""From rows of T+1 tokens to the arrays of a batch that a decoder is trained on.

The shapes and meanings are those of the design: targets are the inputs moved by one, segments and positions begin
anew with each document, and what carries no loss has weight 0 and 0 target bytes. Which tokens form a row is
data/read/packing.py.
"""

import numpy as np
from jaxtyping import Int

from t5x_like.core.errors import UsageError
from t5x_like.core.types import ArraySpec
from t5x_like.data.config import DataConfig
from t5x_like.data.read.interface import Batch, Draw, Feature, Span, per_token
from t5x_like.data.read.mixtures import Size
from t5x_like.data.read.packing import PACKINGS, Rows, pack
from t5x_like.data.token_set import TokenSet

_ARRAYS = {
    "inputs": "int32",
    "targets": "int32",
    "loss_weights": "float32",
    "target_bytes": "int32",
    "positions": "int32",
    "segment_ids": "int32",
}


def arrays(config: DataConfig) -> dict[str, ArraySpec]:
    names = dict(_ARRAYS)
    if config.attend_across_documents:
        del names["segment_ids"]
    return per_token(config, names | {"prefix": "int32"} if config.prefix else names, config.length)


def check(config: DataConfig) -> None:
    if config.prefix and (config.packing != "examples" or not config.fields.inputs or config.chats):
        raise UsageError(
            "config.data.prefix=True needs examples with inputs, each whole in its row, without a chat template; set "
            "config.data.fields.inputs and config.data.packing='examples'"
        )


class Causal:
    """Rows of documents, packed as config.data.packing says."""

    def __init__(self, token_set: TokenSet, config: DataConfig, stride: int, *, bos: int | None):
        shape = {"length": config.length, "stride": stride}
        self._packing = pack(config.packing, token_set, **shape, truncate=config.truncate, bos=bos)
        self._attends, self._prefix = config.attend_across_documents, config.prefix
        self.cut, self.trained = self._packing.cut, self._packing.trained

    @property
    def size(self) -> Size:
        return self._packing.size

    def batch(self, rows: Int[np.ndarray, "n"], draw: Draw) -> Batch:
        del draw
        read = self._packing.read(rows)
        arrays = batch(read, attend_across_documents=self._attends)
        return arrays | {"prefix": _prefix(read)} if self._prefix else arrays

    def documents(self, row: int) -> list[Span]:
        return self._packing.documents(row)


def batch(rows: Rows, *, attend_across_documents: bool) -> Batch:
    """{inputs, targets, loss_weights, segment_ids, positions, target_bytes}, each [n, T].

    Segments count from 1 in each row, 0 is padding. With `attend_across_documents` segment_ids are left out and
    positions run through the row.
    """
    length = rows.tokens.shape[1] - 1
    columns = np.arange(length + 1, dtype=np.int32)
    trained = (rows.trained & (columns < rows.valid[:, None]))[:, 1:]
    arrays = {
        "inputs": np.ascontiguousarray(rows.tokens[:, :-1]),
        "targets": np.ascontiguousarray(rows.tokens[:, 1:]),
        "loss_weights": trained.astype(np.float32),
        "target_bytes": np.where(trained, rows.byte_counts[:, 1:], 0).astype(np.int32),
    }
    if attend_across_documents:
        return arrays | {"positions": np.broadcast_to(columns[:-1], (len(trained), length)).copy()}
    begins = rows.begins[:, :-1].copy()
    begins[:, 0] = True  # a document that goes on from the row before is a segment of its own
    padding = columns[:-1] >= rows.valid[:, None]
    segment_ids = np.where(padding, 0, np.cumsum(begins, axis=1, dtype=np.int32))
    first = np.maximum.accumulate(np.where(begins, columns[:-1], 0), axis=1)
    positions = np.where(padding, 0, columns[:-1] - first)
    return arrays | {"segment_ids": segment_ids.astype(np.int32), "positions": positions.astype(np.int32)}


def _prefix(rows: Rows) -> Int[np.ndarray, "n T"]:
    """1 at the inputs of whole examples, which are the tokens without loss (and at a first token, which all see)."""
    columns = np.arange(rows.tokens.shape[1])
    return (~rows.trained & (columns < rows.valid[:, None]))[:, :-1].astype(np.int32)


CAUSAL = Feature(
    packings=PACKINGS,
    encoder=False,
    arrays=arrays,
    open=lambda token_set, config, vocabulary, stride: Causal(token_set, config, stride, bos=vocabulary.bos_id),
    check=check,
)
