"""THE table of programs that are planned for published rows: our config pretrain/llama3_8b with a row's settings."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A train step for a topology.

    model, mesh: overrides of the sections of these names. batch: rows over all devices. remat: config.model.remat.
    options: of the compiler. layers: of the row's model where the program has fewer, model["decoder.layers"]; its loops
    over layers then count so many turns. saved: regions of which the published run computes nothing again but the
    kernels, having saved their products on the host. one_of: so many equal slices of the row; what passes between them
    is left out.
    """

    name: str
    model: Mapping[str, Any]
    topology: str
    batch: int
    length: int
    remat: str
    slices: int = 1
    mesh: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    layers: int | None = None
    saved: tuple[str, ...] = ()
    one_of: int = 1

    def asked(self) -> dict[str, Any]:
        """What decides the program, as JSON has it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        asked = {name: value for name, value in fields.items() if name not in ("name", "layers", "saved", "one_of")}
        return json.loads(json.dumps(asked))  # tuples are lists there


def _sizes(layers: int, width: int, heads: int, kv_heads: int, mlp: int, vocab: int) -> dict[str, Any]:
    """A Llama of these sizes."""
    return {
        "size": "2_70b",
        "width": width,
        "vocab_size": vocab,
        "max_length": 131_072,
        "decoder.layers": layers,
        "decoder.heads": heads,
        "decoder.kv_heads": kv_heads,
        "decoder.head_size": 128,
        "decoder.mlp": mlp,
    }


def _max(layers: int, width: int, heads: int, mlp: int) -> dict[str, Any]:
    """MaxText's default decoder at a `global_parameter_scale`: no grouped heads, 32,000 tokens."""
    return _sizes(layers, width, heads, heads, mlp, 32_000)


def _llama405b(layers: int) -> dict[str, Any]:
    return _sizes(layers, 16_384, 128, 8, 53_248, 128_256)


def _llama70b(layers: int, vocab: int = 128_256) -> dict[str, Any]:
    return {"size": "70b", "max_length": 131_072, "vocab_size": vocab, "decoder.layers": layers}


def _gpt3(layers: int) -> dict[str, Any]:
    return {
        "family": "gpt2",
        "size": "xl",
        "width": 12_288,
        "vocab_size": 50_304,
        "max_length": 16_384,
        "decoder.layers": layers,
        "decoder.heads": 96,
        "decoder.kv_heads": 96,
        "decoder.head_size": 128,
        "decoder.mlp": 49_152,
    }


_FUJI_7B = {"size": "2_7b", "vocab_size": 32_768, "head.tied": True}
# Gemma3's layers by fields: every sixth sees all, norms stand around both branches, queries and keys are normed.
_GEMMA3_12B = {
    **_sizes(48, 3840, 16, 8, 15_360, 262_144),
    "decoder.head_size": 256,
    "decoder.windows": (1024, 1024, 1024, 1024, 1024, 0),
    "decoder.rope.theta": (10_000.0, 10_000.0, 10_000.0, 10_000.0, 10_000.0, 1_000_000.0),
    "decoder.norm_order": "sandwich",
    "decoder.activation": "gelu_tanh",
    "decoder.qk_norm": True,
    "embedding.scale": 0.0,
    "head.tied": True,
}
_LLAMA31_8B = {"size": "3_1_8b"}
# MaxText splits activations between the branches over `tensor` by width, as do these.
_TENSOR = {"rules": "act_embed=tensor"}
# Of 8 chips this compiler would cut each product into as many parts and multiply while the others arrive; the recipe's
# flags fuse whole gathers with products.
_WHOLE_GATHERS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
# MaxText's options for overlap, as far as this compiler takes them on v5p: no row, a comparison (docs/log.md).
_OVERLAP = {
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_enable_async_all_gather": "true",
}

# The rows whose remat is unknown: what fuji.py saves, and all computed again.
_FUJI_7B_DOTS = Program(
    name="fuji_7b-v5p-256",
    model=_FUJI_7B,
    topology="v5p:4x8x8",
    batch=1024,
    length=4096,
    remat="dots",
    mesh={"data": 4, "fsdp": 64},
)
_FUJI_70B_QKV = Program(
    name="llama2_70b-v5p-512-2",
    model={"size": "2_70b"},
    topology="v5p:8x8x8",
    batch=1024,
    length=4096,
    remat="q+k+v",
)

PROGRAMS = (
    Program(
        name="llama2_70b-v5p-512",
        model={"size": "2_70b"},
        topology="v5p:8x8x8",
        batch=2048,
        length=4096,
        remat="q+k+v",
    ),
    Program(
        name="max32b-v5e-256",
        model=_max(32, 8192, 64, 28_672),
        topology="v5e:16x16",
        batch=1024,
        length=2048,
        remat="full",
    ),
    Program(
        name="llama31_8b-v6e-256",
        model=_LLAMA31_8B,
        topology="v6e:16x16",
        batch=1024,
        length=8192,
        remat="full",
        saved=("attention",),
    ),
    Program(
        name="max32b-v5p-64",
        model=_max(32, 8192, 64, 28_672),
        topology="v5p:4x4x4",
        batch=384,
        length=2048,
        remat="q+k+v+mlp_gate+mlp_up",
        mesh={"fsdp": 16, "tensor": 4, **_TENSOR},
    ),
    Program(
        name="llama31_70b-v6e-256",
        model=_llama70b(8),
        topology="v6e:16x16",
        batch=1280,
        length=8192,
        remat="q+k+v",
        layers=80,
    ),
    Program(
        name="llama31_70b-tpu7x-64",
        model=_llama70b(80),
        topology="tpu7x:4x4x4",
        batch=256,
        length=8192,
        remat="q+k+v+context",
    ),
    Program(
        name="gpt3_175b-v6e-256",
        model=_gpt3(32),
        topology="v6e:16x16",
        batch=768,
        length=2048,
        remat="full",
        layers=96,
    ),
    Program(
        name="fuji_70b-v5e-4x256",
        model=_llama70b(8, 32_768),
        topology="v5e:16x16",
        batch=256,
        length=4096,
        remat="dots",
        layers=80,
        one_of=4,
    ),
    Program(
        name="llama31_405b-v5p-512",
        model=_llama405b(42),
        topology="v5p:8x8x8",
        batch=1024,
        length=8192,
        remat="context",
        layers=126,
    ),
    Program(
        name="llama31_405b-tpu7x-256",
        model=_llama405b(42),
        topology="tpu7x:4x8x8",
        batch=1536,
        length=8192,
        remat="k+v",
        layers=126,
    ),
    Program(
        name="llama31_8b-v6e-8",
        model=_LLAMA31_8B,
        topology="v6e:2x4",
        batch=24,
        length=8192,
        remat="full",
        options=_WHOLE_GATHERS,
        saved=("attention",),
    ),
    Program(
        name="max512b-v5p-512",
        model=_max(128, 16_384, 128, 57_344),
        topology="v5p:8x8x8",
        batch=1024,
        length=2048,
        remat="full",
        mesh={"fsdp": 64, "tensor": 8, **_TENSOR},
    ),
    Program(
        name="llama31_405b-v6e-2x256",
        model=_llama405b(21),
        topology="v6e:16x16",
        slices=2,
        batch=512,
        length=8192,
        remat="full",
        mesh={"slice": 2, "rules": "embed=slice+fsdp"},
        layers=126,
    ),
    Program(
        name="max32b-v5p-2x64",
        model=_max(32, 8192, 64, 28_672),
        topology="v5p:4x4x4",
        slices=2,
        batch=768,
        length=2048,
        remat="q+k+v+mlp_gate+mlp_up",
        mesh={"slice": 2, "fsdp": 16, "tensor": 4, **_TENSOR},
    ),
    Program(
        name="max128b-v5p-128",
        model=_max(64, 8192, 128, 57_344),
        topology="v5p:4x4x8",
        batch=128,
        length=2048,
        remat="q+k+v+mlp_gate+mlp_up",
        mesh={"fsdp": 16, "tensor": 8, **_TENSOR},
    ),
    _FUJI_7B_DOTS,
    dataclasses.replace(_FUJI_7B_DOTS, name="fuji_7b-v5p-256-full", remat="full"),
    _FUJI_70B_QKV,
    dataclasses.replace(_FUJI_70B_QKV, name="llama2_70b-v5p-512-2-full", remat="full"),
    Program(
        name="llama2_70b-v5p-512-overlap",
        model={"size": "2_70b"},
        topology="v5p:8x8x8",
        batch=2048,
        length=4096,
        remat="q+k+v",
        options=_OVERLAP,
    ),
    Program(
        name="llama2_70b-v6e-256",
        model={"size": "2_70b", "decoder.layers": 20},
        topology="v6e:16x16",
        batch=512,
        length=4096,
        remat="q+k+v",
        layers=80,
    ),
    Program(
        name="gemma3_12b-v6e-256",
        model=_GEMMA3_12B,
        topology="v6e:16x16",
        batch=256,
        length=32_768,
        remat="full",
    ),
    Program(
        name="llama31_70b_128k-tpu7x-256",
        model={**_llama70b(80), "attention_block": 2048},
        topology="tpu7x:4x8x8",
        batch=64,
        length=131_072,
        remat="q+k+v+context",
        mesh={"fsdp": 64, "sequence": 8},
    ),
)
BY_NAME = {program.name: program for program in PROGRAMS}
