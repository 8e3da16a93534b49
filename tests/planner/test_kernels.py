"""FLOPs of splash attention's kernels against counts by hand, over shapes, masks and block sizes."""

import math
from typing import Any

import pytest
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from t5x_like.core.accelerators import GENERATIONS
from t5x_like.planner.time.kernels import EFFICIENCY, STEP_SECONDS, count_blocks, roofline
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
    steps = 4 * 32 * math.prod(table) / 2  # v5p has two cores, and empty blocks have a step too
    assert found.seconds == pytest.approx(flops / 459e12 / EFFICIENCY + steps * STEP_SECONDS)


def test_causal_flops_come_near_the_masks_own_as_blocks_get_small():
    """At 32 blocks a row 528 of 1024 are computed, where the mask has half: 3% more."""
    small: dict[str, Any] = {"block_q": 128, "block_kv": 128}
    found = roofline(call("splash_mha_fwd", *LLAMA, (1, 32, 32), **small), V5P)
    assert found is not None
    exact = 2 * 2 * 4 * 32 * 4096 * 4096 / 2 * 128
    assert found.flops / exact == pytest.approx(33 / 32)


def test_heads_smaller_than_the_matrix_unit_fill_a_part_of_it():
    for size, generation, part in ((64, "v5p", 0.5), (128, "v5p", 1), (128, "v6e", 1), (192, "v6e", 0.75)):
        row = GENERATIONS[generation]
        found = roofline(call("splash_mha_fwd", (1, 8, 4096, size), (1, 8, 4096, size), (1, 4, 4)), row)
        assert found is not None
        computing = found.seconds - 8 * 16 * row.devices / row.cores * STEP_SECONDS
        assert found.flops / computing == pytest.approx(row.peak / row.devices * EFFICIENCY * part)


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


def of_blocks(size, *, length=4096, name="splash_mha_fwd", generation="v5p", masked=True):
    settings: dict[str, Any] = dict.fromkeys(BLOCKS, size)
    shape, count = (1, 32, length, 128), length // size
    found = roofline(call(name, shape, shape, (1, count, count), masked=masked, **settings), GENERATIONS[generation])
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"])
def test_tiny_blocks_do_less_for_nothing_and_take_longer(name):
    """Of a causal row: what lies above the diagonal is less, and the steps are more."""
    found = {size: of_blocks(size, name=name) for size in (128, 256, 512, 1024, 2048)}
    flops, seconds = [each.flops for each in found.values()], [each.seconds for each in found.values()]
    assert flops == sorted(flops) and flops[-1] / flops[0] == pytest.approx((2 * 3 / 4) / (33 / 32))
    assert seconds[0] > seconds[1] > seconds[2] > seconds[3]
    assert seconds[0] > 2.5 * seconds[3]


def test_large_blocks_waste_more_on_the_diagonal_of_a_short_row_than_of_a_long_one():
    short, long = (of_blocks(2048, length=n).seconds / of_blocks(1024, length=n).seconds for n in (4096, 16384))
    assert short > 1.02 > long


def test_keys_and_values_are_read_anew_in_every_row_of_blocks():
    """32 heads of 128 in bfloat16: q and the output once, k and v in each of 4 rows, where nothing is masked."""
    row = 32 * 4096 * 128 * 2
    assert of_blocks(1024, masked=False).bytes == 2 * row + 2 * 4 * row
    assert of_blocks(512, masked=False).bytes == 2 * row + 2 * 8 * row
    assert of_blocks(1024, name="splash_mha_dkv", masked=False).bytes == 4 * row + 2 * 4 * row
    assert of_blocks(1024, name="splash_mha_dq", masked=False).bytes == 3 * row + 2 * 4 * row


def test_blocks_of_128_wait_for_the_memory_of_a_v6e():
    """Heads of 128 fill half of its matrix units; still it computes faster than it reads."""
    found, row = of_blocks(128, generation="v6e", masked=False), GENERATIONS["v6e"]
    assert found.bytes / row.hbm_speed > found.flops * 2 / row.peak / EFFICIENCY
    assert found.seconds == pytest.approx(found.bytes / row.hbm_speed + 32 * 32 * 32 * STEP_SECONDS)
