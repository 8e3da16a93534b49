"""Every path of attention against one reference that is written out here, for values and every gradient."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from t5x_like.core.errors import UsageError
from t5x_like.layers import attention as module
from t5x_like.layers import kernels
from t5x_like.layers.attention import attention, attention_over_parts
from t5x_like.layers.masks import MaskSpec, allowed
from t5x_like.layers.platform import platform
from t5x_like.parallel import mesh as mesh_module
from t5x_like.parallel import rules
from t5x_like.parallel.rules import MESH_AXES
from t5x_like.parallel.sharding import named, use_rules
from t5x_like.planner.compile import compile_program
from t5x_like.planner.cost import cost
from t5x_like.planner.topology import topology

FAST = {"xla_backend_optimization_level": 0}
SEGMENTS = np.array([[1] * 9 + [2] * 12 + [0] * 3, [1] * 24, [3] * 2 + [7] * 20 + [0] * 2, [0] * 24], np.int32)
PREFIX = np.array([0, 5, 24, 2], np.int32)


def make_mesh(sizes):
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def arrays(rows=4, length=24, heads=4, kv_heads=2, head=8, seed=0):
    random = np.random.default_rng(seed)
    shapes = (rows, length, heads, head), (rows, length, kv_heads, head), (rows, length, kv_heads, head)
    q, k, v = (random.standard_normal(shape, np.float32) for shape in shapes)
    return 2 * q, k, v, random.standard_normal(shapes[0], np.float32)


def reference(q_BTNH, k_BSKH, v_BSKH, seen_BTS, *, scale, softcap=None):
    """The definition: every kv head copied for its queries, one matrix of logits, one softmax."""
    group = q_BTNH.shape[2] // k_BSKH.shape[2]
    k_BSNH, v_BSNH = jnp.repeat(k_BSKH, group, axis=2), jnp.repeat(v_BSKH, group, axis=2)
    logits_BNTS = scale * jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, precision="highest")
    if softcap is not None:
        logits_BNTS = softcap * jnp.tanh(logits_BNTS / softcap)
    seen_B1TS = jnp.asarray(seen_BTS)[:, None]
    weights_BNTS = jax.nn.softmax(jnp.where(seen_B1TS, logits_BNTS, -1e30), axis=-1)
    weights_BNTS = jnp.where(seen_B1TS, weights_BNTS, 0.0)
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH, precision="highest")


def seen_by_definition(rows, length, *, causal=True, window=None, segments=None, prefix=None):
    """The mask as loops over its definition."""
    seen = np.zeros((rows, length, length), bool)
    for b, t, s in np.ndindex(seen.shape):
        near = window is None or (t - s < window and (causal or s - t < window))
        visible = (s <= t or not causal) and near
        visible |= prefix is not None and s < prefix[b] and (causal or window is not None)
        if segments is not None:
            visible &= segments[b, t] == segments[b, s] != 0
        seen[b, t, s] = visible
    return seen


def spec(*, causal=True, window=None, segments=None, prefix=None):
    return MaskSpec(
        causal=causal,
        window=window,
        prefix_lengths_B=None if prefix is None else jnp.asarray(prefix),
        q_segments_BT=None if segments is None else jnp.asarray(segments),
        k_segments_BS=None if segments is None else jnp.asarray(segments),
    )


def with_gradients(function, q, k, v, g):
    out, pull = jax.vjp(function, q, k, v)
    return out, *pull(g)


def run(function, q, k, v, g):
    return jax.jit(functools.partial(with_gradients, function), compiler_options=FAST)(q, k, v, g)


def assert_same(results, references, bound=1e-5):
    for result, expected in zip(results, references, strict=True):
        assert np.abs(expected).max() > 0.01
        assert np.isfinite(result).all()
        assert np.abs(result - expected).max() <= bound * np.abs(expected).max()


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


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "computed_again"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("case", [{}, {"window": 100}, {"segments": True}], ids=str)
def test_blocks_of_queries_give_the_same_as_the_whole(case, kv_heads, keep, monkeypatch):
    monkeypatch.setattr(module, "KEEP_BYTES", 2**40 if keep else 0)
    monkeypatch.setattr(module, "BLOCK", 64)
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
    monkeypatch.setattr(module, "BLOCK", 512)
    assert 0.6 < blocks / flops(512) < 0.7  # (4 + 1) / (2 * 4) of the whole, and the softmax


def test_long_rows_stay_a_short_program():
    blocks = module._Blocks(length=20_000, window=1000, scale=1.0, keep=False).cuts()
    assert len(blocks) <= module.MAX_BLOCKS
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
            assert kernels.splash_fits(q, k, spec(**case))
            return kernels.splash(q, k, v, spec(**case), scale=0.1, softcap=softcap, interpret=True)

    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        results = run(function, q, k, v, g)
    seen = seen_by_definition(2, 256, **case)
    expected = run(functools.partial(reference, seen_BTS=seen, scale=0.1, softcap=softcap), q, k, v, g)
    assert_same(results, expected)


def test_splash_does_not_take_what_it_cannot_compute():
    q, k, _, _ = map(jnp.asarray, arrays(length=256))
    positions = jnp.zeros((4, 256), jnp.int32)
    assert kernels.splash_fits(q, k, spec(window=3, segments=np.ones((4, 256), np.int32)))
    assert not kernels.splash_fits(q[:, :200], k[:, :200], spec())
    assert not kernels.splash_fits(q[:, :128], k, spec())
    assert not kernels.splash_fits(q, k, spec(prefix=PREFIX))
    assert not kernels.splash_fits(q, k, MaskSpec(causal=True, q_positions_BT=positions, k_positions_BS=positions))


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
}


def cudnn(q, k, v, case):
    with use_rules(rules.rules()):
        return kernels.cudnn(q, k, v, spec(**case), scale=0.3)


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
    seen = seen_by_definition(4, 24, **case)
    assert set(asked) == {"cudnn"}
    assert_same(results, run(functools.partial(reference, seen_BTS=seen, scale=0.3), q, k, v, g))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, (sizes, _, _) in CUDNN.items() if not sizes])
def test_cudnn_is_the_definition(name):
    """On a GPU, in bfloat16, against the definition in float32."""
    _, case, kv_heads = CUDNN[name]
    q, k, v, g = (jnp.asarray(x, jnp.bfloat16) for x in arrays(kv_heads=kv_heads, head=64))
    assert kernels.cudnn_fits(q, k, softcap=None)
    results = jax.jit(functools.partial(with_gradients, functools.partial(cudnn, case=case)))(q, k, v, g)
    wide = [x.astype(jnp.float32) for x in (q, k, v, g)]
    seen = seen_by_definition(4, 24, **case)
    expected = with_gradients(functools.partial(reference, seen_BTS=seen, scale=0.3), *wide)
    assert_same([np.asarray(x, np.float32) for x in results], expected, bound=2e-2)


@pytest.mark.xdist_group("libtpu")
def test_splash_compiles_for_a_tpu_that_is_not_there():
    """Grouped heads, segments and a split sequence, forward and backward: keys and values cross the network once a
    direction, and only along the sequence."""
    pytest.importorskip("libtpu", reason="libtpu is not installed (extra [tpu])")
    mesh = mesh_module.make(
        mesh_module.MeshConfig("fsdp", "", None, None, None, 2, None, 2, 2), topology("v5e:2x4").devices
    )
    shapes = (4, 512, 8, 128), (4, 512, 4, 128), (4, 512, 4, 128)
    axes = [("batch", "length", heads, "head") for heads in ("act_heads", "act_kv_heads", "act_kv_heads")]
    table = rules.rules()
    q, k, v = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=named(mesh, table, names, shape))
        for shape, names in zip(shapes, axes, strict=True)
    )
    segments = jax.ShapeDtypeStruct((4, 512), jnp.int32, sharding=named(mesh, table, ("batch", "length"), (4, 512)))

    def function(q, k, v, segments):
        mask = MaskSpec(causal=True, q_segments_BT=segments, k_segments_BS=segments)
        with use_rules(table):
            return with_gradients(lambda *x: attention(*x, mask, scale=0.1), q, k, v, q)

    text = compile_program(jax.jit(function), (q, k, v, segments), mesh=mesh).text
    kernels_called = set(re.findall(r"splash_mha_(?:fwd|dq|dkv)", text))
    assert kernels_called == {"splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"}
    found = [(item.kind, item.axes) for item in cost(text, dict(mesh.shape)).collectives for _ in range(item.count)]
    assert sorted(found) == [("all-gather", ("sequence",))] * 3 + [("reduce-scatter", ("sequence",))] * 2
