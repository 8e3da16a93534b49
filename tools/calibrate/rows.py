"""THE table of published training speeds that the plan's estimates are held against, and the program planned for each.

One row is one published figure of a dense decoder. What is written down is what the source says, in the source's own
unit and convention; what follows from it (step seconds) is computed (published.py). Programs are our config
pretrain/llama3_8b with overrides: model, mesh, batch, length and remat of the row.

Sources:
  maxtext        AI-Hypercomputer/maxtext e591f30: docs/reference/models/tiering.md (settings: the file of benchmarks/
                 at the commit that it links to); src/maxtext/configs/tpu/{v5e,v5p}/README.md and the .sh beside it
  recipes        AI-Hypercomputer/tpu-recipes c8cfe2f: training/{trillium,v5p,ironwood}/*, README.md and run_recipe.sh
  axlearn        apple/axlearn 34aed43: axlearn/experiments/text/gpt/fuji.py, comments beside mesh_rules
  axlearn-paper  arXiv 2507.05411, by a secondary listing
"""

import dataclasses

# Which FLOPs a figure of MFU or TFLOP/s counts for attention: every key of the row, those that a causal mask leaves, or
# none at all (6 x all parameters).
CONVENTIONS = ("full", "causal", "parameters")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder by the sizes that FLOPs are counted from. windows: a pattern over the layers, 0 for all of a row."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    gated: bool = True
    tied: bool = False
    head: int = 128
    windows: tuple[int, ...] = (0,)


SHAPES = {
    "Llama-2 7B (Fuji, tied head)": Shape(32, 4096, 32, 32, 11_008, 32_768, tied=True),
    "Llama-2 70B": Shape(80, 8192, 64, 8, 28_672, 32_000),
    "Llama-2 70B (Fuji)": Shape(80, 8192, 64, 8, 28_672, 32_768),
    "Llama-3.1 8B": Shape(32, 4096, 32, 8, 14_336, 128_256),
    "Llama-3.1 70B": Shape(80, 8192, 64, 8, 28_672, 128_256),
    "Llama-3.1 405B": Shape(126, 16_384, 128, 8, 53_248, 128_256),
    "Gemma3 12B": Shape(
        48, 3840, 16, 8, 15_360, 262_144, tied=True, head=256, windows=(1024, 1024, 1024, 1024, 1024, 0)
    ),
    "GPT-3 175B": Shape(96, 12_288, 96, 96, 49_152, 50_304, gated=False, tied=True),
    # MaxText's default decoder at a `global_parameter_scale`.
    "MaxText 32B": Shape(32, 8192, 64, 64, 28_672, 32_000),
    "MaxText 128B": Shape(64, 8192, 128, 128, 57_344, 32_000),
    "MaxText 512B": Shape(128, 16_384, 128, 128, 57_344, 32_000),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A published figure. model: a name in SHAPES; chips: of all slices; batch: rows a step; remat: as published.

    One or several of step_seconds, tokens (a second and chip), tflops (a second and chip) and mfu are given; the first
    of them in this order is compared. convention: what tflops and mfu count. programs: names of the programs planned
    for it; two where what is published lies between them. note: what is known to differ.
    """

    name: str
    source: str
    model: str
    chip: str
    chips: int
    batch: int
    length: int
    remat: str
    programs: tuple[str, ...]
    convention: str = ""
    step_seconds: float | None = None
    tokens: float | None = None
    tflops: float | None = None
    mfu: float | None = None
    note: str = ""


ROWS = (
    Row(
        name="llama2-70b v5p 512",
        source="maxtext",
        model="Llama-2 70B",
        chip="v5p",
        chips=512,
        batch=2048,
        length=4096,
        remat="save_dot_except_mlpwi",
        programs=("llama2_70b-v5p-512",),
        convention="full",
        tokens=692,
        note="the MFU of 65.4% printed beside it lies between both conventions",
    ),
    Row(
        name="32b v5p 64",
        source="maxtext",
        model="MaxText 32B",
        chip="v5p",
        chips=64,
        batch=384,
        length=2048,
        remat="minimal",
        programs=("max32b-v5p-64",),
        convention="full",
        tflops=328,
        mfu=0.7147,
    ),
    Row(
        name="32b v5p 2x64",
        source="maxtext",
        model="MaxText 32B",
        chip="v5p",
        chips=128,
        batch=768,
        length=2048,
        remat="minimal",
        programs=("max32b-v5p-2x64",),
        convention="full",
        tflops=319,
        mfu=0.6943,
    ),
    Row(
        name="128b v5p 128",
        source="maxtext",
        model="MaxText 128B",
        chip="v5p",
        chips=128,
        batch=128,
        length=2048,
        remat="minimal",
        programs=("max128b-v5p-128",),
        convention="full",
        tflops=315,
        mfu=0.6868,
    ),
    Row(
        name="512b v5p 512",
        source="maxtext",
        model="MaxText 512B",
        chip="v5p",
        chips=512,
        batch=1024,
        length=2048,
        remat="full",
        programs=("max512b-v5p-512",),
        convention="full",
        tflops=294,
        mfu=0.6399,
    ),
    Row(
        name="405b v5p 512",
        source="recipes",
        model="Llama-3.1 405B",
        chip="v5p",
        chips=512,
        batch=1024,
        length=8192,
        remat="context, mlpwo offloaded",
        programs=("llama31_405b-v5p-512",),
        convention="causal",
        step_seconds=131.474,
        tokens=124.618,
        tflops=314.530,
        note="published with 96 MiB of scoped vmem and activations on the host",
    ),
    Row(
        name="fuji-7b v5p 256",
        source="axlearn-paper",
        model="Llama-2 7B (Fuji, tied head)",
        chip="v5p",
        chips=256,
        batch=1024,
        length=4096,
        remat="unknown",
        programs=("fuji_7b-v5p-256", "fuji_7b-v5p-256-full"),
        step_seconds=2.5,
        note="batch, length and mesh are those of fuji.py, an assumption; its remat is dots and attention",
    ),
    Row(
        name="fuji-70b v5p 512",
        source="axlearn-paper",
        model="Llama-2 70B (Fuji)",
        chip="v5p",
        chips=512,
        batch=1024,
        length=4096,
        remat="unknown",
        programs=("llama2_70b-v5p-512-2", "llama2_70b-v5p-512-2-full"),
        step_seconds=11.6,
        note="batch and length are those of fuji.py, an assumption; its remat is q, k, v",
    ),
    Row(
        name="32b v5e 256",
        source="maxtext",
        model="MaxText 32B",
        chip="v5e",
        chips=256,
        batch=1024,
        length=2048,
        remat="full",
        programs=("max32b-v5e-256",),
        convention="full",
        tflops=132,
        mfu=0.6686,
    ),
    Row(
        name="fuji-70b v5e 4x256",
        source="axlearn",
        model="Llama-2 70B (Fuji)",
        chip="v5e",
        chips=1024,
        batch=1024,
        length=4096,
        remat="dots, offloaded",
        programs=("fuji_70b-v5e-4x256",),
        convention="parameters",
        step_seconds=14.3736,
        mfu=0.5987,
        note="published with activations on the host",
    ),
    Row(
        name="llama31-8b v6e 256",
        source="recipes",
        model="Llama-3.1 8B",
        chip="v6e",
        chips=256,
        batch=1024,
        length=8192,
        remat="inputs, q, k, v, out_proj offloaded",
        programs=("llama31_8b-v6e-256",),
        convention="full",
        step_seconds=4.546,
        tokens=7207.336,
        tflops=417.397,
        note="published with 96 MiB of scoped vmem, larger blocks and one backward kernel of attention",
    ),
    Row(
        name="llama31-8b v6e 8",
        source="recipes",
        model="Llama-3.1 8B",
        chip="v6e",
        chips=8,
        batch=24,
        length=8192,
        remat="inputs, q, k, v, out_proj offloaded",
        programs=("llama31_8b-v6e-8",),
        convention="full",
        step_seconds=3.443,
        tokens=7138.890,
        tflops=413.433,
        note="as llama31-8b v6e 256",
    ),
    Row(
        name="llama31-70b v6e 256",
        source="recipes",
        model="Llama-3.1 70B",
        chip="v6e",
        chips=256,
        batch=1280,
        length=8192,
        remat="inputs, q, k, v offloaded",
        programs=("llama31_70b-v6e-256",),
        convention="full",
        step_seconds=42.656,
        tokens=960.248,
        tflops=462.297,
        note="as llama31-8b v6e 256",
    ),
    Row(
        name="llama2-70b v6e 256",
        source="recipes",
        model="Llama-2 70B",
        chip="v6e",
        chips=256,
        batch=512,
        length=4096,
        remat="q, k, v offloaded",
        programs=("llama2_70b-v6e-256",),
        convention="full",
        step_seconds=9.052,
        tokens=905.021,
        tflops=402.274,
        note="as llama31-8b v6e 256; the log has 2 rows a device, the recipe's text 3",
    ),
    Row(
        name="gemma3-12b v6e 256",
        source="recipes",
        model="Gemma3 12B",
        chip="v6e",
        chips=256,
        batch=256,
        length=32_768,
        remat="custom, without q, k, v",
        programs=("gemma3_12b-v6e-256",),
        convention="causal",
        step_seconds=7.318,
        tokens=4477.768,
        tflops=349.442,
        note="published with 120 MiB of scoped vmem; what else is saved is MaxText's default of custom",
    ),
    Row(
        name="gpt3-175b v6e 256",
        source="recipes",
        model="GPT-3 175B",
        chip="v6e",
        chips=256,
        batch=768,
        length=2048,
        remat="full",
        programs=("gpt3_175b-v6e-256",),
        convention="full",
        step_seconds=17.182,
        tokens=357.580,
        tflops=384.891,
        note="published with 96 MiB of scoped vmem; fused q, k, v",
    ),
    Row(
        name="405b v6e 2x256",
        source="recipes",
        model="Llama-3.1 405B",
        chip="v6e",
        chips=512,
        batch=512,
        length=8192,
        remat="full, inputs offloaded",
        programs=("llama31_405b-v6e-2x256",),
        convention="full",
        step_seconds=54.803,
        tokens=149.482,
        tflops=392.454,
        note="published with 96 MiB of scoped vmem; weights are divided over both slices",
    ),
    Row(
        name="llama31-70b tpu7x 64",
        source="recipes",
        model="Llama-3.1 70B",
        chip="tpu7x",
        chips=64,
        batch=256,
        length=8192,
        remat="inputs, q, k, v, context",
        programs=("llama31_70b-tpu7x-64",),
        convention="causal",
        step_seconds=12.20,
        tokens=2686.98,
        tflops=1207.05,
        note="published with 60 MiB of scoped vmem, another attention kernel, first moments in bf16",
    ),
    Row(
        name="llama31-70b tpu7x 256, 128k",
        source="recipes",
        model="Llama-3.1 70B",
        chip="tpu7x",
        chips=256,
        batch=64,
        length=131_072,
        remat="inputs, q, k, v, context, mlpwo",
        programs=("llama31_70b_128k-tpu7x-256",),
        convention="causal",
        step_seconds=34.02,
        tokens=963.03,
        tflops=897.94,
        note="as llama31-70b tpu7x 64; context parallelism of 8",
    ),
    Row(
        name="405b tpu7x 256",
        source="recipes",
        model="Llama-3.1 405B",
        chip="tpu7x",
        chips=256,
        batch=1536,
        length=8192,
        remat="k, v; inputs, mlpwo offloaded",
        programs=("llama31_405b-tpu7x-256",),
        convention="causal",
        step_seconds=98.34,
        tokens=499.77,
        tflops=1261.40,
        note="as llama31-70b tpu7x 64",
    ),
)
