"""Attention is its definition for values and every gradient, whatever the mask, the bias and the mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.layers.attention import blockwise
from t5x_like.layers.attention.biases import Buckets
from t5x_like.layers.attention.choice import attention
from t5x_like.layers.attention.masks import MaskSpec, allowed
from t5x_like.layers.attention.materialised import attention_over_parts
from t5x_like.parallel import rules
from t5x_like.parallel.sharding import use_rules
from tests.layers.attention.definition import (
    FAST,
    PREFIX,
    SEGMENTS,
    arrays,
    assert_same,
    make_mesh,
    path,
    reference,
    run,
    seen_by_definition,
    spec,
    with_gradients,
)

CASES = {
    "causal": {},
    "window": {"window": 5},
    "window_of_two": {"window": 2},
    "segments": {"segments": SEGMENTS},
    "segments_and_window": {"segments": SEGMENTS, "window": 7},
    "full": {"causal": False},
    "both_sides": {"causal": False, "window": 4, "segments": SEGMENTS},
    "prefix": {"prefix": PREFIX},
    "prefix_and_segments": {"prefix": PREFIX, "segments": SEGMENTS, "window": 3},
}


@pytest.mark.parametrize("name", CASES)
def test_mask_is_its_definition(name):
    case = CASES[name]
    matrix = allowed(spec(**case), q_length=24, k_length=24)
    expected = seen_by_definition(4, 24, **case)
    matrix = np.ones((1, 24, 24), bool) if matrix is None else matrix
    np.testing.assert_array_equal(np.broadcast_to(matrix, expected.shape), expected)


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["", "softcap"])
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_equal_the_definition(name, softcap):
    case = CASES[name]
    q, k, v, g = arrays()
    results = run(lambda q, k, v: attention(q, k, v, spec(**case), scale=0.3, softcap=softcap), q, k, v, g)
    seen = seen_by_definition(4, 24, **case)
    assert_same(results, run(functools.partial(reference, seen_BTS=seen, scale=0.3, softcap=softcap), q, k, v, g))
    if case.get("segments") is not None:
        padding = SEGMENTS == 0
        for result in results:
            assert (np.asarray(result)[padding] == 0).all()


def test_two_packed_prefix_examples_equal_the_two_alone():
    """Examples of 10 and 14 tokens with prefixes of 6 and 3."""
    q, k, v, g = arrays(rows=1)
    index = np.arange(24)[None]
    packed = spec(segments=np.where(index < 10, 1, 2), prefix=(index < 6) | ((index >= 10) & (index < 13)))
    together = run(lambda *x: attention(*x, packed, scale=0.3), q, k, v, g)
    causal = run(lambda *x: attention(*x, spec(segments=np.where(index < 10, 1, 2)), scale=0.3), q, k, v, g)
    assert np.abs(together[0] - causal[0]).max() > 0.1
    for cut, length in ((slice(0, 10), 6), (slice(10, 24), 3)):
        lone = spec(prefix=np.arange(cut.stop - cut.start)[None] < length)
        alone = run(lambda *x, mask=lone: attention(*x, mask, scale=0.3), *(x[:, cut] for x in (q, k, v, g)))
        assert_same([np.asarray(x)[:, cut] for x in together], alone)


# Queries and keys of different rows: an encoder's output, with segments of its own. Segment 4 of the queries finds no
# keys; its output is zero.
CROSS_Q = np.array([[1] * 9 + [2] * 12 + [0] * 3, [4] * 24], np.int32)
CROSS_K = np.array([[1] * 20 + [2] * 4 + [0] * 6, [1] * 30], np.int32)


def crossing(softcap=None):
    """(mask, seen, arrays) of 24 queries and 30 keys."""
    q, _, _, g = arrays(rows=2)
    _, k, v, _ = arrays(rows=2, length=30, seed=1)
    mask = MaskSpec(causal=False, q_segments_BT=jnp.asarray(CROSS_Q), k_segments_BS=jnp.asarray(CROSS_K))
    return mask, (CROSS_Q[:, :, None] == CROSS_K[:, None, :]) & (CROSS_K != 0)[:, None, :], (q, k, v, g)


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "computed_again"])
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["blockwise", "materialised"])
def test_cross_attention_is_its_definition(softcap, keep, monkeypatch):
    monkeypatch.setattr(blockwise, "KEEP_BYTES", 2**40 if keep else 0)
    monkeypatch.setattr(blockwise, "BLOCK", 16)
    mask, seen, (q, k, v, g) = crossing()
    results = run(lambda *x: attention(*x, mask, scale=0.3, softcap=softcap), q, k, v, g)
    assert_same(results, run(functools.partial(reference, seen_BTS=seen, scale=0.3, softcap=softcap), q, k, v, g))
    assert (np.asarray(results[0])[1] == 0).all()
    # As many keys as queries, and still other rows.
    square = dataclasses.replace(mask, k_segments_BS=mask.k_segments_BS[:, :24])
    results = run(lambda *x: attention(*x, square, scale=0.3, softcap=softcap), q, k[:, :24], v[:, :24], g)
    expected = functools.partial(reference, seen_BTS=seen[:, :, :24], scale=0.3, softcap=softcap)
    assert_same(results, run(expected, q, k[:, :24], v[:, :24], g))


BLOCKED = {
    "causal": {},
    "full": {"causal": False},
    "both_sides": {"causal": False, "window": 70},
    "prefix": {"prefix": True},
    "segments": {"segments": True, "causal": False},
}


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "computed_again"])
@pytest.mark.parametrize("name", BLOCKED)
def test_a_position_bias_reaches_every_block_and_gets_its_gradient(name, keep, monkeypatch):
    monkeypatch.setattr(blockwise, "KEEP_BYTES", 2**40 if keep else 0)
    monkeypatch.setattr(blockwise, "BLOCK", 64)
    case, length = dict(BLOCKED[name]), 200
    q, k, v, g = arrays(rows=2, length=length, head=4)
    if "segments" in case:
        case["segments"] = np.sort(np.random.default_rng(0).integers(0, 4, (2, length)))[:, ::-1].astype(np.int32)
    if "prefix" in case:
        case["prefix"] = np.isin(np.arange(length), (3, 150, 190))[None].repeat(2, 0)
    assert path(q, k, spec(**case), platform="cpu", bias=True)[0] == "blockwise"
    table = np.random.default_rng(3).standard_normal((16, 4)).astype(np.float32)
    assert_bias_is_its_definition(spec(**case), seen_by_definition(2, length, **case), table, (q, k, v, g))


def assert_bias_is_its_definition(mask, seen, table, inputs, softcap=None):
    """Values, and gradients of queries, keys, values and the table."""
    q, k, v, g = inputs
    index = np.arange(q.shape[1])[None], np.arange(k.shape[1])[None]

    def with_bias(q, k, v, table):
        return attention(q, k, v, mask, scale=0.3, softcap=softcap, bias=Buckets(table, True, 60))

    def expected(q, k, v, table):
        matrix = Buckets(table, True, 60).matrix(*map(jnp.asarray, index))
        return reference(q, k, v, seen_BTS=seen, scale=0.3, softcap=softcap, bias=matrix)

    def pulled(function, *x):
        out, pull = jax.vjp(function, *x)
        return out, *pull(g)

    results, references = (
        jax.jit(functools.partial(pulled, f), compiler_options=FAST)(q, k, v, table) for f in (with_bias, expected)
    )
    plain = run(lambda *x: attention(*x, mask, scale=0.3, softcap=softcap), q, k, v, g)
    assert np.abs(plain[0] - results[0]).max() > 0.1
    assert_same(results, references)


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["blockwise", "materialised"])
def test_a_position_bias_in_cross_attention_and_beside_a_softcap(softcap):
    mask, seen, inputs = crossing()
    table = np.random.default_rng(3).standard_normal((16, 4)).astype(np.float32)
    assert_bias_is_its_definition(mask, seen, table, inputs, softcap)


def test_a_traced_window_gives_the_same_as_a_static_one():
    q, k, v, g = arrays()
    static = run(lambda *x: attention(*x, spec(window=5), scale=0.3), q, k, v, g)

    def with_window(window, q, k, v, g):
        return with_gradients(lambda *x: attention(*x, spec(window=window), scale=0.3), q, k, v, g)

    traced = jax.jit(with_window)(jnp.int32(5), q, k, v, g)
    other = run(lambda *x: attention(*x, spec(window=6), scale=0.3), q, k, v, g)
    assert np.abs(np.asarray(static[0]) - np.asarray(other[0])).max() > 0.01
    assert_same(traced, static)


def test_parts_equal_their_concatenation():
    """A cache whose slots are in any order, some empty, beside the new keys."""
    q, k, v, _ = arrays(length=6)
    order = np.array([3, 0, 2, 1])
    empty = np.array([-1, -1])
    positions = np.concatenate([order, empty])[None].repeat(4, 0).astype(np.int32)
    cache_k, cache_v = (np.concatenate([x[:, order], 99 * x[:, :2]], axis=1) for x in (k, v))
    new = jnp.array([[4, 5]] * 4, jnp.int32)
    old_mask = MaskSpec(causal=True, window=4, q_positions_BT=new, k_positions_BS=jnp.asarray(positions))
    new_mask = MaskSpec(causal=True, window=4, q_positions_BT=new, k_positions_BS=new)

    def over_parts(q, cache_k, cache_v, k, v):
        return attention_over_parts(q, [(cache_k, cache_v, old_mask), (k, v, new_mask)], scale=0.3)

    split = jax.jit(over_parts)(q[:, 4:], cache_k, cache_v, k[:, 4:], v[:, 4:])
    whole = jax.jit(lambda *x: attention(*x, spec(window=4), scale=0.3))(q, k, v)
    assert np.abs(split - whole[:, 4:]).max() < 1e-6


# On a CPU the path is XLA's; how kernels are placed on a mesh: test_kernels.py.
MESHES = {
    "data4": {"data": 4},
    "tensor4": {"tensor": 4},  # more shards than kv heads
    "sequence4": {"sequence": 4},
    "data2_sequence2_tensor2": {"data": 2, "sequence": 2, "tensor": 2},
}


@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_gives_what_one_device_gives(name):
    q, k, v, g = arrays()
    case = {"segments": SEGMENTS, "window": 7}

    def function(q, k, v):
        with use_rules(rules.rules()):
            return attention(q, k, v, spec(**case), scale=0.3)

    with jax.set_mesh(make_mesh(MESHES[name])):
        results = run(function, q, k, v, g)
    seen = seen_by_definition(4, 24, **case)
    assert_same(results, run(functools.partial(reference, seen_BTS=seen, scale=0.3), q, k, v, g))
