"""Greedy text of the 30M Llama with equal random weights: `generate` of ours and of transformers, 1 and 16 rows."""

import pathlib
import tempfile
from typing import Any

from tools.benchmark import timing
from tools.benchmark.shape import SHAPE, config, transformers_model
from tools.benchmark.timing import THREADS, Values

PROMPT, NEW, ROWS = 128, 128, (1, 16)


def measure(rounds: int, steps: int) -> None:
    ours, theirs = "decode:ours", "decode:transformers"
    print(f"\ngreedy decoding, {SHAPE}, tied, fp32, {PROMPT} prompt and {NEW} new tokens, {THREADS} threads; median of "
          f"{rounds} interleaved rounds of {steps} runs")  # fmt: skip
    print(timing.machine("torch", "transformers"))
    with tempfile.TemporaryDirectory() as name:
        folder = str(pathlib.Path(name, "model"))
        timing.run_worker("decode:weights", {"folder": folder})
        for rows in ROWS:
            values = {"folder": folder, "rows": rows, "steps": steps}
            results = timing.in_turns([ours, theirs], values, rounds=rounds)
            for worker, label in {ours: "ours", theirs: "transformers"}.items():
                seconds = timing.median(results[worker])
                print(
                    f"  {rows:>2} rows  {label:<14}{rows * NEW / seconds:8.0f} tokens/s  {seconds:6.3f} s  "
                    f"{timing.ratio(results[theirs], results[worker])} transformers"
                )
            pairs = zip(results[ours][0]["tokens"], results[theirs][0]["tokens"], strict=True)
            print(f"  {rows:>2} rows  the same text in {sum(a == b for a, b in pairs)} of them")


def _weights(values: Values) -> dict[str, Any]:
    transformers_model(tied=True).save_pretrained(values["folder"])
    return {}


def _prompts(rows: int) -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(0, SHAPE["vocab"], (rows, PROMPT))


def _ours(values: Values) -> dict[str, Any]:
    from t5x_like.core import environment

    environment.apply(environment.READING)
    import jax

    from t5x_like.convert.convert import load_params
    from t5x_like.convert.foreign import open_foreign
    from t5x_like.core import tree
    from t5x_like.inference import decode
    from t5x_like.inference.sampling import GREEDY
    from t5x_like.inference.weights import for_decoding, serving_specs
    from t5x_like.models import config as model_config
    from t5x_like.runs import roles

    model = roles.build_model(model_config.resolve(config(tied=True).model), rules="", platform="cpu")
    wanted = {path: jax.ShapeDtypeStruct(spec.shape, spec.dtype) for path, spec in tree.leaves(serving_specs(model))}
    with open_foreign(values["folder"]) as foreign:
        params = load_params(foreign, lambda _: wanted)
    model, params = for_decoding(model, params)
    prompts = _prompts(values["rows"]).tolist()

    def generate() -> list[list[int]]:
        return decode.generate(
            model,
            params,
            prompts,
            max_new_tokens=NEW,
            sampling=GREEDY,
            seed=0,
        )

    return {"seconds": timing.seconds(generate, values["steps"], warmup=1), "tokens": generate()}


def _transformers(values: Values) -> dict[str, Any]:
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(THREADS)
    model = LlamaForCausalLM.from_pretrained(values["folder"], dtype=torch.float32).eval()
    prompts = torch.tensor(_prompts(values["rows"]))

    def generate() -> Any:
        with torch.inference_mode():
            return model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )

    seconds = timing.seconds(generate, values["steps"], warmup=1)
    return {"seconds": seconds, "tokens": generate()[:, PROMPT:].tolist()}


WORKERS: dict[str, timing.Worker] = {"weights": _weights, "ours": _ours, "transformers": _transformers}
