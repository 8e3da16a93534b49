"""Greedy text of a 300M Llama with random weights, 1 and 16 rows: ours in float32 and in int8, and transformers'.

Seconds of one more token alone: a long answer less one of a single token, so that the prompt does not count.
"""

import pathlib
import tempfile
from typing import Any

from tools.benchmark import timing
from tools.benchmark.timing import THREADS, Values

# 290M parameters, 1.16 GB in float32: far more than any cache.
SHAPE = {"width": 1024, "layers": 20, "heads": 16, "mlp": 2816, "vocab": 32_000, "length": 512}
PROMPT, NEW, ROWS = 16, 32, (1, 16)
LABELS = {"int8:ours": "ours fp32", "int8:ours_int8": "ours int8", "int8:transformers": "transformers fp32"}


def measure(rounds: int, steps: int) -> None:
    print(f"\ngreedy decoding, {SHAPE}, tied, {PROMPT} prompt tokens, {THREADS} threads; seconds of a token in {NEW}, "
          f"median of {rounds} interleaved rounds of {steps} runs")  # fmt: skip
    print(timing.machine("torch", "transformers"))
    with tempfile.TemporaryDirectory() as name:
        folder = str(pathlib.Path(name, "model"))
        timing.run_worker("int8:weights", {"folder": folder})
        for rows in ROWS:
            values = {"folder": folder, "rows": rows, "steps": steps}
            results = timing.in_turns(list(LABELS), values, rounds=rounds)
            for worker, label in LABELS.items():
                found = results[worker]
                print(
                    f"  {rows:>2} rows  {label:<18}{rows / timing.median(found):8.1f} tokens/s  "
                    f"{1e3 * timing.median(found):7.1f} ms a token  "
                    f"{timing.ratio(results['int8:ours'], found)} ours fp32  held {found[0]['bytes'] / 1e6:.0f} MB"
                )


def _weights(values: Values) -> dict[str, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=SHAPE["width"],
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["heads"],
        intermediate_size=SHAPE["mlp"],
        vocab_size=SHAPE["vocab"],
        max_position_embeddings=SHAPE["length"],
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(values["folder"])
    return {}


def _prompts(rows: int) -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(3, SHAPE["vocab"], (rows, PROMPT))


def _ours(values: Values, dtype: str = "float32") -> dict[str, Any]:
    from t5x_like.core import environment

    environment.apply(environment.READING)
    import jax

    from t5x_like.compress import reading
    from t5x_like.convert.convert import load_params
    from t5x_like.convert.foreign import open_foreign
    from t5x_like.convert.native import model_config
    from t5x_like.core import tree
    from t5x_like.inference import decode
    from t5x_like.inference.sampling import GREEDY
    from t5x_like.inference.weights import for_decoding, serving_specs
    from t5x_like.runs import roles

    with open_foreign(values["folder"]) as foreign:
        config = model_config(foreign.family, foreign.fields, dtype="float32", where=values["folder"])
        model = roles.build_model(config, rules="", platform="cpu")
        specs = serving_specs(model)
        wanted = tree.map_with_path(lambda _, spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs)
        if dtype == "int8":
            wanted = reading.templates(specs, wanted, lambda path, shape: None)
        params = load_params(foreign, lambda _: tree.flatten(wanted))
    size = sum(array.nbytes for array in jax.tree.leaves(params))
    model, params = for_decoding(model, params)
    prompts = _prompts(values["rows"]).tolist()

    def generate(new: int) -> list[list[int]]:
        return decode.generate(model, params, prompts, max_new_tokens=new, sampling=GREEDY, seed=0)

    return {"seconds": _of_a_token(generate, values["steps"]), "bytes": size}


def _ours_int8(values: Values) -> dict[str, Any]:
    return _ours(values, "int8")


def _transformers(values: Values) -> dict[str, Any]:
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(THREADS)
    model: Any = LlamaForCausalLM.from_pretrained(values["folder"], dtype=torch.float32).eval()
    prompts = torch.tensor(_prompts(values["rows"]))

    def generate(new: int) -> Any:
        fixed = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            return model.generate(prompts, attention_mask=torch.ones_like(prompts), eos_token_id=None, **fixed)

    size = sum(parameter.nbytes for parameter in model.parameters())
    return {"seconds": _of_a_token(generate, values["steps"]), "bytes": size}


def _of_a_token(generate: Any, steps: int) -> float:
    long, short = (timing.seconds(lambda new=new: generate(new), steps, warmup=1) for new in (NEW, 1))
    return (long - short) / (NEW - 1)


WORKERS: dict[str, timing.Worker] = {
    "weights": _weights,
    "ours": _ours,
    "ours_int8": _ours_int8,
    "transformers": _transformers,
}
