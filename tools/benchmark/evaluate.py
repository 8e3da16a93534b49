"""Scoring of multiple-choice requests by the 30M Llama: real tokens a second, beside the forward pass of training and
beside lm-evaluation-harness's own backend on transformers with equal weights."""

import pathlib
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

from tools.benchmark import timing
from tools.benchmark.shape import SHAPE, config, transformers_model
from tools.benchmark.timing import THREADS, Values

# Contexts and answers as those of HellaSwag or MMLU with examples; four answers to each question.
QUESTIONS, CHOICES, CONTEXT, ANSWER = 48, 4, (40, 400), (2, 40)


def measure(rounds: int, steps: int) -> None:
    ours, theirs = "evaluate:ours", "evaluate:harness"
    print(f"\nscoring, {SHAPE}, fp32, {QUESTIONS} questions of {CHOICES} answers, contexts of {CONTEXT} tokens, "
          f"{THREADS} threads; median of {rounds} interleaved rounds of {steps} runs")  # fmt: skip
    print(timing.machine("torch", "transformers", "lm_eval"))
    with tempfile.TemporaryDirectory() as name:
        values = {"folder": str(pathlib.Path(name, "model")), "steps": steps}
        timing.run_worker("evaluate:weights", values)
        results = timing.in_turns([ours, theirs], values, rounds=rounds)
    tokens = sum(len(context) + len(answer) for context, answer in _requests())
    forward = [result["forward"] for result in results[ours]]
    for label, speeds in {
        "forward pass of training": forward,
        "evaluate": [tokens / result["seconds"] for result in results[ours]],
        "harness on transformers": [tokens / result["seconds"] for result in results[theirs]],
    }.items():
        shares = sorted(speed / other for speed, other in zip(speeds, forward, strict=True))
        middle = sorted(speeds)[len(speeds) // 2]
        print(f"  {label:<28}{middle:8.0f} tokens/s  {shares[len(shares) // 2]:5.0%} of the forward pass "
              f"(rounds {shares[0]:.0%} to {shares[-1]:.0%})")  # fmt: skip
    pairs = zip(results[ours][0]["scores"], results[theirs][0]["scores"], strict=True)
    print(f"  largest difference of a score: {max(abs(a - b) for a, b in pairs):.2g}")


def _requests() -> list[tuple[list[int], list[int]]]:
    import numpy as np

    random = np.random.default_rng(0)

    def ids(shortest: int, longest: int) -> list[int]:
        return random.integers(3, SHAPE["vocab"], random.integers(shortest, longest + 1)).tolist()

    contexts = [ids(*CONTEXT) for _ in range(QUESTIONS)]
    return [(context, ids(*ANSWER)) for context in contexts for _ in range(CHOICES)]


def _weights(values: Values) -> dict[str, Any]:
    transformers_model().save_pretrained(values["folder"])
    return {}


def _ours(values: Values) -> dict[str, Any]:
    """Both in one process, in turns: a busy machine slows them alike."""
    from t5x_like.core import environment

    environment.apply(environment.READING)
    import jax

    from t5x_like.convert.stored import open_model
    from t5x_like.core import tree
    from t5x_like.data.tokenizers import vocabularies
    from t5x_like.evaluation.backend import Backend
    from t5x_like.evaluation.model import EvaluatedModel
    from t5x_like.runs import roles

    stored = open_model(values["folder"])
    model = roles.build_model(stored.config, rules="", platform="cpu")
    wanted = {path: jax.ShapeDtypeStruct(spec.shape, spec.dtype) for path, spec in tree.leaves(model.specs())}
    params = tree.unflatten(stored.read(wanted))
    subject = EvaluatedModel.of("ours", model, params, vocabularies.load("bytes"), start_id=0, mesh=None, chat=None)
    backend, requests = Backend(subject, batch_tokens=2048, seed=0), [(None, *pair) for pair in _requests()]
    forward = _forward()
    scores = [logp for logp, _ in backend._loglikelihood_tokens(requests)]
    forward()
    spent, rates = [], []
    for _ in range(values["steps"]):
        rates.append(SHAPE["rows"] * SHAPE["length"] / timing.seconds(forward, 3, warmup=0))
        spent.append(timing.seconds(lambda: backend._loglikelihood_tokens(requests), 1, warmup=0))
    return {"seconds": statistics.median(spent), "forward": statistics.median(rates), "scores": scores}


def _forward() -> Callable[[], Any]:
    """The evaluation of a batch of whole rows, as a run compiles it."""
    import jax
    import numpy as np

    from t5x_like.parallel import mesh as meshes
    from t5x_like.runs import program as programs
    from t5x_like.runs import train

    experiment = train.from_config(config())
    mesh = meshes.make(experiment.mesh)
    with jax.set_mesh(mesh):
        program = programs.step_program(experiment, mesh)
        state, frozen = programs.initialize(program, seed=0)
        rows = np.random.default_rng(1).integers(0, SHAPE["vocab"], (SHAPE["rows"], SHAPE["length"] + 1))
        batch = {name: np.ones(leaf.shape, leaf.dtype) for name, leaf in program.batch.items()}
        batch |= {"inputs": rows[:, :-1].astype(np.int32), "targets": rows[:, 1:].astype(np.int32)}
        batch["positions"] = np.broadcast_to(np.arange(SHAPE["length"], dtype=np.int32), batch["inputs"].shape)
        placed = {name: jax.device_put(batch[name], leaf.sharding) for name, leaf in program.batch.items()}

    def run() -> Any:
        with jax.set_mesh(mesh):
            return jax.block_until_ready(program.evaluate(state["params"], frozen, placed))

    return run


def _harness(values: Values) -> dict[str, Any]:
    import torch
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, models
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(THREADS)
    model = LlamaForCausalLM.from_pretrained(values["folder"], dtype=torch.float32).eval()
    words = {f"<{token}>": token for token in range(SHAPE["vocab"])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<0>")))
    tokenizer.add_special_tokens({"pad_token": "<0>", "eos_token": "<2>", "bos_token": "<1>"})
    backend = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16, device="cpu")
    requests = [(("", ""), *pair) for pair in _requests()]
    scores: list[float] = []

    def run() -> None:
        scores[:] = [logp for logp, _ in backend._loglikelihood_tokens(requests, disable_tqdm=True)]

    return {"seconds": timing.seconds(run, values["steps"], warmup=1), "scores": scores}


WORKERS: dict[str, timing.Worker] = {"weights": _weights, "ours": _ours, "harness": _harness}
