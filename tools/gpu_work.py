"""What the parts of tools/gpu_report.py do, each in a process of its own: functions of a shape (SHAPES there) that give
a result as JSON holds it."""

import functools
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = 8


def _gpu_tests(shape: Mapping[str, Any]) -> dict[str, Any]:
    """pytest over the files that hold tests for a GPU."""
    del shape
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-m", "gpu", "-p", "no:cacheprovider", *map(str, files)]
    environment = os.environ | {"T5X_LIKE_TEST_PLATFORM": "cuda"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(result.stdout, result.stderr, sep="\n")
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error|skipped)", result.stdout)}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE)
    if not counts:
        raise SystemExit(f"Error: pytest ran no test, status {result.returncode}")
    return {"counts": counts, "failed": failed}


def _train(shape: Mapping[str, Any], *, rank: int = 0) -> dict[str, Any]:
    """A training step of the config's own program, on random tokens; with a rank, of LoRA on every matrix."""
    import numpy as np

    from configs import common
    from tools.benchmark import train_step

    config = common.config()
    config.model.update({"family": "llama", "size": shape["size"], "remat": shape["remat"]})
    config.model.dtype.compute = "bfloat16"
    config.data.update({"batch_size": shape["rows"], "length": shape["length"], "attend_across_documents": True})
    if rank:
        config.adapter.name = "lora"
        config.adapter.lora.update({"rank": rank, "alpha": 2.0 * rank, "targets": (".*",)})
        config.checkpoint.init_from = "not read: parameters are drawn"
    tokens = np.random.default_rng(0).integers(0, 512, (shape["rows"], shape["length"] + 1))
    measured = train_step.ours(config, {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}, STEPS)
    return measured | {"tokens": shape["rows"] * shape["length"], **_device()}


def _packed(shape: Mapping[str, Any]) -> dict[str, Any]:
    """The same in longer rows, in each of which four documents are kept apart."""
    import numpy as np

    from configs import common
    from tools.benchmark import train_step

    rows, length = shape["packed"]
    document = length // 4
    config = common.config()
    config.model.update({"family": "llama", "size": shape["size"], "remat": shape["remat"]})
    config.model.dtype.compute = "bfloat16"
    config.data.update({"batch_size": rows, "length": length, "attend_across_documents": False})
    tokens = np.random.default_rng(0).integers(0, 512, (rows, length + 1))
    places = np.broadcast_to(np.arange(length), (rows, length))
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    batch |= {"segment_ids": places // document + 1, "positions": places % document}
    measured = train_step.ours(config, batch, STEPS)
    return measured | {"tokens": rows * length, **_device()}


def _torch_model(shape: Mapping[str, Any], **options: Any) -> Any:
    """transformers' Llama of the same numbers on the GPU, with random weights."""
    import torch
    import transformers

    from configs import common
    from t5x_like.convert.families.llama import settings
    from t5x_like.models import config as model_config

    config = common.config()
    config.model.update({"family": "llama", "size": shape["size"]})
    numbers = settings(model_config.resolve(config.model))
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**numbers), **options)


def _train_torch(shape: Mapping[str, Any]) -> dict[str, Any]:
    """The same step by transformers and torch: float32 weights, bfloat16 by autocast, layers checkpointed."""
    import torch

    from tools.benchmark import train_step

    model = _torch_model(shape, dtype=torch.float32)
    model.gradient_checkpointing_enable()
    model.train()
    tokens = torch.randint(0, 512, (shape["rows"], shape["length"]), device=model.device)

    def loss() -> Any:
        with torch.autocast(model.device.type, torch.bfloat16):
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    return train_step.in_torch(model, loss, STEPS) | {"tokens": shape["rows"] * shape["length"]}


def _decode_torch(shape: Mapping[str, Any]) -> dict[str, Any]:
    """`generate` of transformers on such prompts, bfloat16."""
    import torch

    from tools.benchmark import timing

    model = _torch_model(shape, dtype=torch.bfloat16).eval()
    rates = {}
    for rows in shape["decode"]:
        prompts = torch.randint(0, 512, (rows, shape["new"]), device=model.device)

        @torch.inference_mode()
        def run(prompts: Any = prompts) -> object:
            text = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=shape["new"],
                min_new_tokens=shape["new"],
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )
            return text.cpu()

        rates[str(rows)] = rows * shape["new"] / timing.seconds(run, 3, warmup=1)
    return {"tokens_per_second": rates, "parameters": sum(value.numel() for value in model.parameters())}


def _decode(shape: Mapping[str, Any]) -> dict[str, Any]:
    """Greedy text after prompts of as many random tokens; matrices in bfloat16."""
    from t5x_like.core import environment

    environment.apply(environment.READING)
    import jax
    import numpy as np

    from configs import common
    from t5x_like.inference.decode import generate
    from t5x_like.inference.sampling import GREEDY
    from t5x_like.inference.weights import serving_params
    from t5x_like.models import config as model_config
    from t5x_like.runs import roles
    from tools.benchmark import timing

    config = common.config()
    config.model.update({"family": "llama", "size": shape["size"]})
    config.model.dtype.compute = "bfloat16"
    device = _device()
    model = roles.build_model(model_config.resolve(config.model), rules="", platform=device["platform"])
    params = jax.jit(lambda key: serving_params(model, model.init(key)))(jax.random.key(0))
    rates = {}
    for rows in shape["decode"]:
        prompts = np.random.default_rng(0).integers(0, 512, (rows, shape["new"])).tolist()

        def run(prompts: Any = prompts) -> object:
            return generate(model, params, prompts, max_new_tokens=shape["new"], sampling=GREEDY, seed=0)

        rates[str(rows)] = rows * shape["new"] / timing.seconds(run, 3, warmup=1)
    return {"tokens_per_second": rates, "parameters": model.parameter_count(), **device}


def _grpo(shape: Mapping[str, Any]) -> dict[str, Any]:
    """An iteration of GRPO: answers from random weights that no end token ends, rewards, one update."""
    from configs import common
    from tools.benchmark import grpo

    config = common.config()
    config.model.update({"family": "llama", "size": shape["size"], "remat": shape["remat"]})
    config.model.dtype.compute = "bfloat16"
    prompts, samples, new, micro_batches = shape["grpo"]
    measured = grpo.ours(
        config.model, prompts=prompts, samples=samples, new=new, micro_batches=micro_batches, steps=STEPS // 2
    )
    return measured | {"answers": prompts * samples, "tokens": prompts * samples * new}


def _device() -> dict[str, Any]:
    import jax

    from t5x_like.training.peaks import device_peak

    device = jax.devices()[0]
    return {"device": device.device_kind, "platform": device.platform, "peak": device_peak(device.device_kind)}


WORK: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "tests": _gpu_tests,
    "train": _train,
    "lora": functools.partial(_train, rank=16),
    "decode": _decode,
    "grpo": _grpo,
    "packed": _packed,
    "train_torch": _train_torch,
    "decode_torch": _decode_torch,
}
