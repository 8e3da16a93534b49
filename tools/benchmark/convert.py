"""A Hugging Face checkpoint of 1 GB into a model directory and back, beside copying its files with fsync."""

import os
import pathlib
import shutil
import tempfile
from typing import Any

from tools.benchmark import timing
from tools.benchmark.timing import Values

# A Llama of 251M parameters, in float32.
SHAPE = {"hidden_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16, "intermediate_size": 2816}
VOCAB = 22_000
LABELS = {
    "convert:copy": "copy of its files, fsync",
    "convert:to_native": "into a model directory",
    "convert:to_huggingface": "back into their form",
}


def measure(rounds: int, steps: int) -> None:
    del steps  # a round is one conversion
    with tempfile.TemporaryDirectory() as name:
        source = str(pathlib.Path(name, "source"))
        size = timing.run_worker("convert:source", {"source": source})["bytes"]
        results = timing.in_turns(list(LABELS), {"folder": name, "source": source}, rounds=rounds)
    print(f"\nconversion of {size / 1e9:.2f} GB, {timing.THREADS} threads; median of {rounds} interleaved rounds")
    print(timing.machine("transformers"))
    for worker, label in LABELS.items():
        wall, cpu = (timing.median(results[worker], field) for field in ("wall", "cpu"))
        print(
            f"  {label:<28}{wall:6.2f} s  {size / wall / 1e6:6.0f} MB/s  {cpu:6.2f} s of CPU  "
            f"{timing.ratio(results[worker], results['convert:copy'], 'wall')} the copy"
        )


def _source(values: Values) -> dict[str, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=False, **SHAPE))
    model.save_pretrained(values["source"], max_shard_size="400MB")
    return {"bytes": sum(path.stat().st_size for path in pathlib.Path(values["source"]).iterdir())}


def _copy(values: Values) -> dict[str, Any]:
    return _timed(values, "copy", lambda target: shutil.copytree(values["source"], target))


def _to_native(values: Values) -> dict[str, Any]:
    from t5x_like.core import environment

    environment.apply(environment.READING)
    from t5x_like.convert import convert

    return _timed(values, "native", lambda target: convert.to_native(values["source"], target))


def _to_huggingface(values: Values) -> dict[str, Any]:
    from t5x_like.core import environment

    environment.apply(environment.READING)
    from t5x_like.convert import convert

    source = str(pathlib.Path(values["folder"], "native"))
    return _timed(values, "huggingface", lambda target: convert.to_huggingface(source, target))


def _timed(values: Values, name: str, function: Any) -> dict[str, Any]:
    """function(target) with what it wrote forced onto the disk."""
    target = pathlib.Path(values["folder"], name)
    shutil.rmtree(target, ignore_errors=True)

    def whole() -> None:
        function(str(target))
        for path in target.rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)

    return timing.spent(whole)


WORKERS: dict[str, timing.Worker] = {
    "source": _source,
    "copy": _copy,
    "to_native": _to_native,
    "to_huggingface": _to_huggingface,
}
