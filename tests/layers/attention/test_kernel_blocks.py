"""cuDNN's kernel in blocks of queries, for masks that would be large matrices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.layers.attention import kernels
from t5x_like.layers.attention.masks import MaskSpec
from tests.layers.attention.definition import (
    arrays,
    assert_same,
    make_mesh,
    reference,
    run,
    seen_by_definition,
    with_gradients,
)
from tests.layers.attention.test_kernels import cudnn

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


def test_platform_is_that_of_the_mesh_not_of_the_process():
    assert platform() == jax.default_backend() == "cpu"
    device = type(make_mesh({}).abstract_mesh.abstract_device)(device_kind="TPU v5p", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert platform() == "tpu"


# Meshes. On a CPU the path is XLA's; the kernels' own placement is checked with splash in interpret mode.

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


@pytest.mark.parametrize(
    ("sizes", "overrides", "split"),
    [
        ({"sequence": 2}, "", True),
        ({"sequence": 2}, "length=", False),
        ({"data": 2}, "", False),
        ({"data": 2}, "length=data, batch=slice", True),
    ],
)
def test_blocks_of_queries_serve_rows_that_the_rules_do_not_split(sizes, overrides, split):
    q, k, v, _ = arrays()

    def function(q, k, v):
        with use_rules(rules.rules(overrides)):
            return attention(q, k, v, spec(), scale=0.3)

    with jax.set_mesh(make_mesh(sizes)):
        program = str(jax.make_jaxpr(function)(q, k, v))
    assert ("_over_blocks" in program) != split


SPLASH = {
    "causal": ({}, {}, 2),
    "full": ({}, {"causal": False}, 4),
    "window_softcap": ({}, {"window": 100, "softcap": 2.0}, 1),
    "data2_segments": ({"data": 2}, {"segments": True}, 2),
    "tensor4_replicated_kv_heads": ({"tensor": 4}, {}, 2),
    "sequence2_tensor2_segments": ({"sequence": 2, "tensor": 2}, {"segments": True, "window": 150}, 2),
}


@pytest.mark.parametrize("name", SPLASH)
def test_splash_equals_the_definition(name):
    sizes, case, kv_heads = SPLASH[name]
    case = dict(case)
    softcap = case.pop("softcap", None)
    q, k, v, g = arrays(rows=2, length=256, heads=4, kv_heads=kv_heads, head=128)
    if "segments" in case:
        case["segments"] = np.sort(np.random.default_rng(0).integers(0, 3, (2, 256)))[:, ::-1].astype(np.int32)

    def function(q, k, v):
        with use_rules(rules.rules()):
            assert not kernels.why_not_splash(q, k, spec(**case), bias=False)
            return kernels.splash(q, k, v, spec(**case), scale=0.1, softcap=softcap, interpret=True)

    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        results = run(function, q, k, v, g)
    seen = seen_by_definition(2, 256, **case)
    expected = run(functools.partial(reference, seen_BTS=seen, scale=0.1, softcap=softcap), q, k, v, g)
    assert_same(results, expected)


def path(q, k, mask, *, platform, softcap=False, bias=False, capability=None):
    return attention_path(q, k, mask, softcap=softcap, bias=bias, platform=platform, compute_capability=capability)


def test_each_path_says_why_it_was_taken():
    q, k = (jax.ShapeDtypeStruct((4, 4096, heads, 128), jnp.bfloat16) for heads in (8, 2))
    short = [jax.ShapeDtypeStruct((4, 4100, heads, 128), jnp.bfloat16) for heads in (8, 2)]
    one = jnp.ones((1, 1), jnp.int32)
    prefix = MaskSpec(causal=True, k_prefix_BS=jnp.ones((1, 1), bool))
    placed = MaskSpec(causal=True, q_positions_BT=one, k_positions_BS=one)
    packed = MaskSpec(causal=True, window=64, q_segments_BT=one, k_segments_BS=one)
    assert path(q, k, packed, platform="tpu")[0] == "splash"
    assert path(*short, packed, platform="tpu") == ("blockwise", "no splash: length 4100 is no multiple of 128")
    name, reason = path(*short, packed, platform="tpu", softcap=True)
    assert name == "materialised" and "4100 is no multiple of 128" in reason and "softcap" in reason
    assert path(q, k, prefix, platform="tpu") == ("blockwise", "no splash: a prefix that all queries see")
    assert path(q, k, packed, platform="tpu", bias=True) == ("blockwise", "no splash: a position bias")
    assert path(short[0], k, spec(causal=False), platform="tpu")[0] == "blockwise"
    assert path(short[0], k, spec(), platform="tpu")[0] == "materialised"
    assert path(q, k, placed, platform="tpu")[0] == "materialised"
    assert path(q, k, packed, platform="gpu") == (
        "cudnn",
        "cuDNN's flash attention kernel, its mask a matrix for each of 2 blocks of queries",
    )
    odd = [jax.ShapeDtypeStruct((4, 4097, heads, 128), jnp.bfloat16) for heads in (8, 2)]
    assert path(*odd, packed, platform="gpu")[0] == "blockwise"  # cuDNN refuses such a mask
    assert path(q, k, packed, platform="gpu", softcap=True) == (
        "materialised",
        "no cuDNN: a softcap; not blockwise: a softcap",
    )
    wide = [jax.ShapeDtypeStruct((4, 4096, 8, 256), jnp.bfloat16)] * 2
    assert path(*wide, spec(), platform="gpu") == ("blockwise", "no cuDNN: head size 256 is no multiple of 8 up to 128")
    assert path(*wide, spec(), platform="gpu", capability=8.9)[0] == "blockwise"
    assert path(*wide, spec(), platform="gpu", capability=9.0)[0] == "cudnn"
    assert path(q, k, spec(), platform="gpu", bias=True)[0] == "cudnn"
    assert path(q, k, packed, platform="gpu", bias=True)[0] == "blockwise"
    assert path(q, k, packed, platform="cpu")[0] == "blockwise"
    assert path(q, k, spec(window=jnp.int32(3)), platform="cpu") == (
        "materialised",
        "not blockwise: the window is traced",
    )


def test_heads_split_over_other_axes_than_kv_heads_is_an_error():
    q, k, v, _ = arrays(length=128, heads=8, kv_heads=4)
    table = rules.rules("act_kv_heads=sequence,length=")

    def function(q, k, v):
        with use_rules(table):
            return kernels.splash(q, k, v, spec(), scale=1.0, softcap=None)

    with jax.set_mesh(make_mesh({"sequence": 2, "tensor": 2})), pytest.raises(UsageError, match="split alike"):
        jax.jit(function).lower(q, k, v)


CUDNN = {
    "causal": ({}, {}, 2),
    "one_kv_head": ({}, {}, 1),
    "full": ({}, {"causal": False}, 4),
    "window": ({}, {"window": 5}, 2),
    "prefix": ({}, {"prefix": PREFIX}, 2),
    "data2_segments": ({"data": 2}, {"segments": SEGMENTS}, 2),
    "tensor2_segments_window": ({"tensor": 2}, {"segments": SEGMENTS, "window": 7}, 2),
    "sequence2": ({"sequence": 2}, {"segments": SEGMENTS}, 4),
    "tensor2_bias": ({"tensor": 2}, {"bias": True}, 2),
    "sequence2_bias": ({"sequence": 2}, {"causal": False, "bias": True}, 2),
}


SLOPES = np.array([2.0, 0.5, 0.1, 0.02], np.float32)


def cudnn(q, k, v, case):
    case = dict(case)
    bias = Alibi(jnp.asarray(SLOPES)) if case.pop("bias", False) else None
    with use_rules(rules.rules()):
        assert not kernels.why_not_cudnn(
            q.astype(jnp.bfloat16),
            k.astype(jnp.bfloat16),
            spec(**case),
            softcap=False,
            bias=bias is not None,
            compute_capability=None,
        )
        return kernels.cudnn(q, k, v, spec(**case), scale=0.3, bias=bias)


def by_definition(case):
    """The reference with the mask and the bias of a case."""
    case = dict(case)
    bias = None
    if case.pop("bias", False):
        distances = np.abs(np.arange(24)[:, None] - np.arange(24))
        bias = jnp.asarray(-SLOPES[:, None, None] * distances)[None]
    return functools.partial(reference, seen_BTS=seen_by_definition(4, 24, **case), scale=0.3, bias=bias)


@pytest.mark.parametrize("name", CUDNN)
def test_what_cudnn_is_asked_for_is_the_definition(name, monkeypatch):
    """The same call with XLA's implementation in the place of the kernel: arguments, masks and places on the mesh."""
    asked = []
    plain = jax.nn.dot_product_attention

    def with_xla(*arguments, implementation, **options):
        asked.append(implementation)
        return plain(*arguments, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", with_xla)
    sizes, case, kv_heads = CUDNN[name]
    q, k, v, g = arrays(kv_heads=kv_heads)
    with jax.set_mesh(make_mesh(sizes)):
        results = run(functools.partial(cudnn, case=case), q, k, v, g)
    assert set(asked) == {"cudnn"}
    assert_same(results, run(by_definition(case), q, k, v, g))


BLOCKED = {
    "segments": ({}, {"segments": True}, 2),
    "segments_window": ({}, {"segments": True, "window": 70}, 2),
    "prefix": ({}, {"prefix": True}, 1),
    "both_ways_window": ({}, {"causal": False, "window": 70}, 4),
    "data2": ({"data": 2}, {"segments": True}, 2),
    "sequence2": ({"sequence": 2}, {"segments": True}, 4),
}


def blocked(name):
    """(sizes of the mesh, the case with its arrays, kv heads): rows of 512, three blocks of queries and more."""
    sizes, case, kv_heads = BLOCKED[name]
    random, case = np.random.default_rng(0), dict(case)
    if "segments" in case:
        case["segments"] = np.sort(random.integers(0, 4, (2, 512)))[:, ::-1].astype(np.int32)
    if "prefix" in case:
        case["prefix"] = random.random((2, 512)) < 0.1
    return sizes, case, kv_heads


@pytest.mark.parametrize("name", BLOCKED)
def test_cudnn_in_blocks_of_queries_is_the_definition(name, monkeypatch):
    plain, asked = jax.nn.dot_product_attention, []

    def with_xla(*arguments, implementation, mask, **options):
        asked.append(mask.shape)
        return plain(*arguments, implementation="xla", mask=mask, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", with_xla)
    monkeypatch.setattr(kernels, "MASK_BYTES", 2**17)
    sizes, case, kv_heads = blocked(name)
    q, k, v, g = arrays(rows=2, length=512, kv_heads=kv_heads)
    with jax.set_mesh(make_mesh(sizes)):
        results = run(functools.partial(cudnn, case=case), q, k, v, g)
    assert {shape[2] for shape in asked} == {128}
    # Keys that a block cannot see are left out, unless the sequence is split or a prefix may be there.
    whole = "sequence" in sizes or "prefix" in case
    assert min(shape[3] for shape in asked) == (512 if whole else 128 if case.get("causal", True) else 197)
    expected = functools.partial(reference, seen_BTS=seen_by_definition(2, 512, **case), scale=0.3)
    assert_same(results, run(expected, q, k, v, g))


def test_packed_rows_on_a_gpu_hold_no_matrix_of_the_whole_row(monkeypatch):
    """The program for a GPU that is not there, forward and backward: the largest mask is that of one block of queries,
    and each block's kernel runs once forward, once backward."""
    library = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91000)
    rows, length = 2, 8192
    q, k = (jax.ShapeDtypeStruct((rows, length, heads, 128), jnp.bfloat16) for heads in (8, 2))
    segments = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def function(q, k, v, g, segments):
        mask = MaskSpec(causal=True, q_segments_BT=segments, k_segments_BS=segments)
        assert kernels.cudnn_blocks(q, k, mask) == 4
        return with_gradients(lambda *x: kernels.cudnn(*x, mask, scale=0.1), q, k, v, g)

    text = jax.jit(function).trace(q, k, k, q, segments).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @(__cudnn\S+?)\(", text)
    assert sorted(calls) == ["__cudnn$fmhaScaleBiasSoftmax"] * 4 + ["__cudnn$fmhaScaleBiasSoftmaxBackward"] * 4
    shapes = {tuple(map(int, found.split("x")[:-1])) for found in re.findall(r"tensor<([\dx]+x)\w+>", text)}
    assert not [shape for shape in shapes if shape.count(length) > 1]
    matrices = [shape for shape in shapes if len(shape) > 2 and shape[-1] > 128 and shape[-2] > 128]
    assert max(np.prod(shape) for shape in matrices) == rows * 2048 * length


@pytest.mark.gpu
@pytest.mark.parametrize("name", BLOCKED)
def test_cudnn_in_blocks_of_queries_is_the_definition_on_a_gpu(name, monkeypatch):
    monkeypatch.setattr(kernels, "MASK_BYTES", 2**17)
    _, case, kv_heads = blocked(name)
    q, k, v, g = (jnp.asarray(x, jnp.bfloat16) for x in arrays(rows=2, length=512, kv_heads=kv_heads, head=64))
    results = jax.jit(functools.partial(with_gradients, functools.partial(cudnn, case=case)))(q, k, v, g)
    expected = functools.partial(reference, seen_BTS=seen_by_definition(2, 512, **case), scale=0.3)
    wide = [x.astype(jnp.float32) for x in (q, k, v, g)]
    assert_same([np.asarray(x, np.float32) for x in results], with_gradients(expected, *wide), bound=2e-2)
