"""FLOPs of splash attention's kernels against counts by hand, over shapes, masks and block sizes."""

from typing import Any

import pytest
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from t5x_like.core.accelerators import GENERATIONS
from t5x_like.planner.time.kernels import EFFICIENCY, count_blocks, roofline
from t5x_like.planner.time.schedule import KernelCall

V5P = GENERATIONS["v5p"]
BLOCKS = {"block_q": 1024, "block_kv": 1024, "block_q_dq": 1024, "block_kv_dq": 512}
BLOCKS |= {"block_q_dkv": 1024, "block_kv_dkv": 1024}


def call(name, q, k, table, *, masked=True, **settings: Any):
    """As the compiler writes it: tables of blocks, queries, keys, values, segments, numbers of the queries."""
    tables = [f"s8[{','.join(map(str, table))}]{{2,1,0:T(4,128)(4,1)}}"] * 2
    arrays = [f"bf16[{','.join(map(str, shape))}]{{3,2,1,0}}" for shape in (q, k, k)]
    segments = ["s32[4,4096,128]{2,1,0}", "s32[4,8,4096]{2,1,0}"] if "segmented" in name else []
    numbers = ["s32[4096,128]{1,0:T(8,128)}"] if masked else []
    return KernelCall(name, (*tables, *arrays, *segments, *numbers), BLOCKS | settings)


LLAMA = ((4, 32, 4096, 128), (4, 8, 4096, 128))
# A block of 1024 x 1024 and one product: 2 x 1024 x 1024 x 128; 10 of 16 are not empty; 4 rows x 32 heads.
CAUSAL = 4 * 32 * 10 * 2 * 1024 * 1024 * 128


@pytest.mark.parametrize(
    ("name", "table", "masked", "flops"),
    [
        ("splash_mha_fwd_residuals", (1, 4, 4), True, 2 * CAUSAL),
        ("splash_mha_fwd_segmented_residuals", (1, 4, 4), True, 2 * CAUSAL),
        ("splash_mha_dq_no_residuals", (1, 4, 8), True, 3 * CAUSAL),  # its blocks of keys are 512: 20 of 32
        ("splash_mha_dkv_no_residuals", (1, 4, 4), True, 4 * CAUSAL),
        ("splash_mha_fwd_residuals", (1, 4, 4), False, 2 * CAUSAL * 16 // 10),
        ("splash_mha_dkv_segmented_no_residuals", (1, 4, 4), False, 4 * CAUSAL * 16 // 10),
        ("splash_mha_fwd_residuals", (1, 4, 2), True, 2 * CAUSAL * 7 // 10),  # a window of 1024
        ("splash_mha_dkv_no_residuals", (1, 2, 4), True, 4 * CAUSAL * 7 // 10),  # the same, queries shrunk
    ],
)
def test_flops_are_those_of_the_blocks_that_the_mask_leaves(name, table, masked, flops):
    found = roofline(call(name, *LLAMA, table, masked=masked), V5P)
    assert found is not None
    assert found.flops == flops
    assert found.seconds == pytest.approx(flops / 459e12 / EFFICIENCY)


def test_causal_flops_come_near_the_masks_own_as_blocks_get_small():
    """At 32 blocks a row 528 of 1024 are computed, where the mask has half: 3% more."""
    small: dict[str, Any] = {"block_q": 128, "block_kv": 128}
    found = roofline(call("splash_mha_fwd", *LLAMA, (1, 32, 32), **small), V5P)
    assert found is not None
    exact = 2 * 2 * 4 * 32 * 4096 * 4096 / 2 * 128
    assert found.flops / exact == pytest.approx(33 / 32)


def test_heads_smaller_than_the_matrix_unit_fill_a_part_of_it():
    for size, generation, part in ((64, "v5p", 0.5), (128, "v5p", 1), (128, "v6e", 0.5), (256, "v6e", 1)):
        row = GENERATIONS[generation]
        found = roofline(call("splash_mha_fwd", (1, 8, 4096, size), (1, 8, 4096, size), (1, 4, 4)), row)
        assert found is not None
        assert found.flops / found.seconds == pytest.approx(row.peak / row.devices * EFFICIENCY * part)


def test_a_window_has_as_many_blocks_as_its_table_is_wide():
    assert count_blocks(8, 8, (512, 512), 3) == 1 + 2 + 6 * 3
    assert count_blocks(8, 8, (512, 512), 8) == 36


@pytest.mark.parametrize("name", ["splash_mha_fwd_residuals", "splash_mha_dkv_no_residuals"])
def test_queries_that_are_a_part_of_a_causal_row_count_the_mean_of_all_parts(name):
    """4 shards of a row of 16 blocks: 136 blocks of the whole, 34 each."""
    found = roofline(call(name, (1, 8, 4096, 128), (1, 8, 16384, 128), (1, 4, 16)), V5P)
    products = 2 if "fwd" in name else 4
    assert found is not None
    assert found.flops == 8 * 136 // 4 * products * 2 * 1024 * 1024 * 128


@pytest.mark.parametrize(
    ("mask", "blocks"),
    [(splash.FullMask, 64), (splash.CausalMask, 36), (lambda shape: splash.LocalMask(shape, (1023, 0), 0), 21)],
)
def test_splash_itself_counts_as_many_blocks(mask, blocks):
    """Its own tables for 4096 x 4096 in blocks of 512, against the count from their shapes."""
    sizes = splash.BlockSizes(512, 512, 512, 512, 512, 512, 512, 512)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask((4096, 4096))]), head_shards=1, q_seq_shards=1, block_sizes=sizes
    )
    for name in ("fwd", "dq", "dkv"):
        info = getattr(kernel, f"{name}_mask_info")
        assert (info.block_mask != 0).sum() == blocks
        settings: dict[str, Any] = dict.fromkeys(BLOCKS, 512)
        masked, shape = info.q_sequence is not None, (1, 1, 4096, 128)
        found = roofline(call(f"splash_mha_{name}", shape, shape, info.data_next.shape, masked=masked, **settings), V5P)
        assert found is not None
        assert found.flops == blocks * {"fwd": 2, "dq": 3, "dkv": 4}[name] * 2 * 512 * 512 * 128


def test_what_is_no_known_kernel_has_no_roofline():
    assert roofline(KernelCall("gmm", ("bf16[8,128]",), {}), V5P) is None
    assert roofline(call("splash_mha_fwd", *LLAMA, (1, 4, 4), block_q=None), V5P) is None
