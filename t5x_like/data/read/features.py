"""From rows of T+1 tokens to the arrays of a batch that a decoder is trained on.

The shapes and meanings are those of the design: targets are the inputs moved by one, segments and positions begin
anew with each document, and what carries no loss has weight 0 and 0 target bytes. Reading rows is data/read/packing.py.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rows:
    """n rows of T+1 tokens.

    tokens, byte_counts: zero behind the last token of a row; begins: where a document begins; trained: tokens that
    are predicted with loss (the first of a row never is); valid: tokens of each row.
    """

    tokens: Int[np.ndarray, "n width"]
    byte_counts: Int[np.ndarray, "n width"]
    begins: Bool[np.ndarray, "n width"]
    trained: Bool[np.ndarray, "n width"]
    valid: Int[np.ndarray, "n"]


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
