"""Attention in blocks of queries: the same numbers as the whole, for less work."""

import functools

import jax
import numpy as np
import pytest

from t5x_like.layers.attention import blockwise
from t5x_like.layers.attention.choice import attention
from t5x_like.layers.attention.masks import MaskSpec
from tests.layers.attention.definition import arrays, assert_same, reference, run, seen_by_definition, spec


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "computed_again"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("case", [{}, {"window": 100}, {"segments": True}], ids=str)
def test_blocks_of_queries_give_the_same_as_the_whole(case, kv_heads, keep, monkeypatch):
    monkeypatch.setattr(blockwise, "KEEP_BYTES", 2**40 if keep else 0)
    monkeypatch.setattr(blockwise, "BLOCK", 64)
    length = 200  # the last block is smaller
    q, k, v, g = arrays(rows=2, length=length, kv_heads=kv_heads, head=4)
    if "segments" in case:
        case = {"segments": np.sort(np.random.default_rng(0).integers(0, 4, (2, length)))[:, ::-1].astype(np.int32)}
    whole = functools.partial(reference, seen_BTS=seen_by_definition(2, length, **case), scale=0.3)
    assert_same(run(lambda *x: attention(*x, spec(**case), scale=0.3), q, k, v, g), run(whole, q, k, v, g))


def test_keys_past_a_block_are_never_multiplied(monkeypatch):
    def flops(length):
        q, k, v, g = arrays(rows=1, length=length)
        mask = MaskSpec(causal=True)
        run = jax.jit(lambda q, k, v: attention(q, k, v, mask, scale=1.0))
        return run.lower(q, k, v).compile().cost_analysis()["flops"]

    blocks = flops(512)
    monkeypatch.setattr(blockwise, "BLOCK", 512)
    assert 0.6 < blocks / flops(512) < 0.7  # (4 + 1) / (2 * 4) of the whole, and the softmax


def test_long_rows_stay_a_short_program():
    blocks = blockwise.Blocks(
        q_length=20_000, k_length=20_000, causal=True, window=1000, prefix=False, blind=False, scale=1.0, keep=False
    ).cuts()
    assert len(blocks) <= blockwise.MAX_BLOCKS
    assert blocks[0][0].start == 0 and blocks[-1][0].stop == 20_000
    assert all(before[0].stop == after[0].start for before, after in zip(blocks, blocks[1:], strict=False))
    assert all(q.start - 999 >= keys.start > q.start - 999 - 64 for q, keys in blocks[1:])
