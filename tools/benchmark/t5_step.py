"""A training step of a T5 of 29M parameters (fewer and narrower layers of T5-small): ours, torch + transformers."""

from typing import Any

from tools.benchmark import timing, train_step
from tools.benchmark.timing import THREADS, Values

SHAPE = {
    "width": 512,
    "layers": 4,  # of the encoder, and of the decoder
    "heads": 8,
    "head_size": 64,
    "mlp": 1536,
    "vocab": 8192,
    "rows": 8,
    "source": 256,
    "length": 128,
}


def measure(rounds: int, steps: int) -> None:
    ours, theirs = "t5_step:ours", "t5_step:torch"
    results = timing.in_turns([ours, theirs], {"steps": steps}, rounds=rounds)
    print(f"\nT5 training step, {SHAPE}, {THREADS} threads; median of {rounds} interleaved rounds of {steps} steps")
    print(timing.machine("torch", "transformers"))
    for name, label in {ours: "ours, fp32", theirs: "torch + transformers, fp32"}.items():
        print(
            f"  {label:<28}{timing.median(results[name]):6.3f} s/step  {timing.ratio(results[theirs], results[name])} "
            f"torch  loss {results[name][-1]['loss']:.4f}"
        )


def _arrays() -> dict[str, Any]:
    import numpy as np

    draw, s = np.random.default_rng(0), SHAPE
    source, target = (draw.integers(2, s["vocab"], (s["rows"], length)) for length in (s["source"], s["length"]))
    inputs = np.concatenate([np.zeros_like(target[:, :1]), target[:, :-1]], axis=1)
    return {"encoder_inputs": source, "inputs": inputs, "targets": target}


def _ours(values: Values) -> dict[str, Any]:
    from configs import common

    config, s = common.config(), SHAPE
    config.model.update({"family": "t5", "size": "small", "vocab_size": s["vocab"], "width": s["width"]})
    config.model.update({"scan": False, "dropout": 0.0})
    for stack in (config.model.encoder, config.model.decoder):
        stack.update({"layers": s["layers"], "heads": s["heads"], "kv_heads": s["heads"], "mlp": s["mlp"]})
        stack.head_size = s["head_size"]
    config.data.update({"features": "source_target", "packing": "single", "batch_size": s["rows"]})
    config.data.update({"length": s["length"], "encoder_length": s["source"]})
    return train_step.ours(config, _arrays(), values["steps"])


def _torch(values: Values) -> dict[str, Any]:
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    s = SHAPE
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=s["vocab"],
            d_model=s["width"],
            d_kv=s["head_size"],
            d_ff=s["mlp"],
            num_layers=s["layers"],
            num_decoder_layers=s["layers"],
            num_heads=s["heads"],
            dropout_rate=0.0,
        )
    )
    arrays = {name: torch.tensor(value) for name, value in _arrays().items()}

    def loss() -> Any:
        logits = model(input_ids=arrays["encoder_inputs"], decoder_input_ids=arrays["inputs"], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), arrays["targets"].flatten())

    return train_step.in_torch(model, loss, values["steps"])


WORKERS: dict[str, timing.Worker] = {"ours": _ours, "torch": _torch}
