"""Which queries a shard computes, and what splash is told of the mask."""

import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention as splash_library
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as tables

from t5x_like.layers.attention import splash_mask
from t5x_like.layers.attention.masks import MaskSpec

MASKS = {
    "causal": (MaskSpec(causal=True), lambda shape: splash_library.CausalMask(shape)),
    "window": (MaskSpec(causal=True, window=300), lambda shape: splash_library.LocalMask(shape, (299, 0), 0)),
    "both_sides": (MaskSpec(causal=False, window=70), lambda shape: splash_library.LocalMask(shape, (69, 69), 0)),
}


def _tables(mask, shards, size=128):
    """Those of the forward kernel and of the keys' gradient."""
    heads = splash_library.MultiHeadMask([mask] * 2)
    return [
        make(heads, (size, size), head_shards=1, q_seq_shards=shards)[0]
        for make in (tables.process_mask, tables.process_mask_dkv)
    ]


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("shards", [1, 2])
def test_the_tables_of_blocks_are_those_of_the_library(name, shards):
    mask, library = MASKS[name]
    ours = _tables(splash_mask.block_mask(mask, 1024, shards=shards, exchanged=False), shards)
    for our, their in zip(ours, _tables(library((1024, 1024)), shards), strict=True):
        for field, one, other in zip(our._fields, our, their, strict=True):
            assert (one is None) == (other is None), field
            assert one is None or (one.dtype == other.dtype and np.array_equal(one, other)), field


@pytest.mark.parametrize("shards", [2, 3, 8])
def test_shards_of_a_causal_row_have_equally_many_blocks(shards):
    """In all kernels, against (2n - 1) / n times the mean before."""
    length, mask = 2 * shards * 256, MaskSpec(causal=True)
    for exchanged in (False, True):
        for table in _tables(splash_mask.block_mask(mask, length, shards=shards, exchanged=exchanged), shards):
            blocks = (table.block_mask[0].reshape(shards, -1) > 0).sum(axis=1)
            busiest = blocks.max() / blocks.mean()
            assert busiest == 1.0 if exchanged else busiest > 1.4
    work = splash_mask.work(mask, length, shards=shards, exchanged=True)
    assert len(set(work.tolist())) == 1


def test_queries_are_exchanged_where_that_spares_work():
    def exchanges(mask, length, shards=4):
        return splash_mask.exchanges(mask, length, shards=shards, multiple=128)

    assert exchanges(MaskSpec(causal=True), 1024)
    assert exchanges(MaskSpec(causal=True, window=900), 1024)
    assert not exchanges(MaskSpec(causal=True, window=128), 8192)  # alike but for the first shard
    assert not exchanges(MaskSpec(causal=True), 1024 + 512)  # half a shard is no multiple of 128
    assert not exchanges(MaskSpec(causal=True), 1024, shards=1)
    assert not exchanges(MaskSpec(causal=False), 1024)
