"""An iteration of GRPO with the 30M Llama: answers, rewards, update; ours and TRL's GRPOTrainer. No answer ends early.

One update of all answers, no reference, so that both score nothing before it; a reward of the answer's text.
"""

import contextlib
import statistics
import tempfile
import time
from collections import defaultdict
from typing import Any

from tools.benchmark import timing
from tools.benchmark.shape import SHAPE, config, transformers_model
from tools.benchmark.timing import THREADS, Values

PROMPTS, SAMPLES, PROMPT, NEW = 8, 8, 64, 64
PARTS = ("rollout", "reward", "scoring", "update")


def measure(rounds: int, steps: int) -> None:
    answers = PROMPTS * SAMPLES
    print(f"\nan iteration of GRPO, {PROMPTS} prompts of {PROMPT} tokens x {SAMPLES} answers of {NEW} new tokens, "
          f"{SHAPE}, fp32, {THREADS} threads; median of {rounds} interleaved rounds of {steps} iterations")  # fmt: skip
    print(timing.machine("torch", "transformers", "trl"))
    results = timing.in_turns(["grpo:ours", "grpo:trl"], {"steps": steps}, rounds=rounds)
    for worker, label in {"grpo:ours": "ours", "grpo:trl": "TRL"}.items():
        seconds = timing.median(results[worker])
        print(
            f"  {label:<8}{answers / seconds:8.2f} answers/s  {seconds:7.3f} s an iteration  "
            f"{timing.ratio(results['grpo:trl'], results[worker])} TRL"
        )
    whole = timing.median(results["grpo:ours"])
    shares = (f"{part} {timing.median(results['grpo:ours'], part) / whole:.0%}" for part in PARTS)
    print(f"  ours: {', '.join(shares)}")


def prompt(seed: int, index: int) -> tuple[str, str]:
    """As many bytes as a prompt has tokens."""
    text = f"{seed} {index} "
    return (text * PROMPT)[:PROMPT], ""


def score(prompt: str, answer: str, expected: str) -> float:
    """Something that differs between answers of random weights."""
    return float(len(answer) % 7)


def ours(model: Any, *, prompts: int, samples: int, new: int, micro_batches: int = 1, steps: int) -> dict[str, Any]:
    """Medians over `steps` iterations of a model section: seconds of a whole one and of each of PARTS."""
    import jax

    from configs import common
    from t5x_like.core import config as bridge
    from t5x_like.core import environment
    from t5x_like.data.tokenizers import vocabularies
    from t5x_like.parallel import mesh as meshes
    from t5x_like.rl.loop import Around
    from t5x_like.rl.prompts import Encoder, Generated
    from t5x_like.rl.rewards import Rewards
    from t5x_like.runs import program as programs
    from t5x_like.runs import rl
    from t5x_like.runs import train as experiments
    from t5x_like.runs.functions import named_functions
    from t5x_like.runs.rl_program import RlExperiment

    given = common.rl_config()
    given.model = model
    given.data.fields.update({"inputs": "", "targets": ""})
    given.data.update({"batch_size": prompts * samples, "length": PROMPT + new - 1})
    given.loop.micro_batches = micro_batches
    # An end token that random weights draw once in a while would make answers shorter: it is no token here.
    given.rl.update({"prompts": prompts, "samples": samples, "new_tokens": new, "generate": prompt})
    given.rl.answers_per_row = samples  # an answer sees its prompt, as in TRL's rows, and a prompt is computed once
    given.rl.rewards.score = common.reward("function", function=score)
    environment.apply(bridge.build(environment.RuntimeConfig, given.runtime, path="config.runtime"))
    stored, _, places = named_functions(given.to_dict())
    experiment = experiments.built(RlExperiment, stored)
    vocabulary = vocabularies.load("bytes").with_extra_ids(experiment.model.vocab_size - 259)
    vocabulary.eos_id = experiment.model.vocab_size
    mesh = meshes.make(experiment.mesh)
    spent: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def timed(what: str):
        begin = time.perf_counter()
        yield
        spent[what] += time.perf_counter() - begin

    with jax.set_mesh(mesh), Rewards(experiment.rl, places, warn=print) as rewards:
        program = programs.step_program(experiment, mesh)
        encoder = Encoder(vocabulary, PROMPT, False, experiment.data)
        asked = rl.Asked(vocabulary, encoder, Generated(prompt, 0, "prompt"), (), {})
        compiled = rl.compile_programs(experiment, program, asked)
        source = rl.iterations_of(
            experiment, compiled, asked, rewards, Around(timed, lambda: None, lambda name, value: value)
        )
        state, frozen = programs.initialize(program, seed=0)
        each: list[dict[str, float]] = []
        for step in range(steps + 1):
            spent.clear()
            begin = time.perf_counter()
            batch = source.batch(step, state, frozen)
            with timed("update"):
                state, metrics = compiled.step(state, frozen, batch)
                jax.block_until_ready(metrics)
            each.append({"seconds": time.perf_counter() - begin, **{part: spent[part] for part in PARTS}})
    return {name: statistics.median(one[name] for one in each[1:]) for name in each[0]}


def _ours(values: Values) -> dict[str, Any]:
    return ours(config().model, prompts=PROMPTS, samples=SAMPLES, new=NEW, steps=values["steps"])


def _trl(values: Values) -> dict[str, Any]:
    import datasets
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    words = {"<pad>": 0, "<eos>": 1} | {f"w{index}": index for index in range(2, SHAPE["vocab"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            times.append(time.perf_counter())

    rows = [{"prompt": " ".join(f"w{2 + (7 * row + place) % 800}" for place in range(PROMPT))} for row in range(64)]
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=PROMPTS * SAMPLES,
            num_generations=SAMPLES,
            max_completion_length=NEW,
            generation_kwargs={"min_new_tokens": NEW},
            max_steps=values["steps"] + 1,
            beta=0.0,
            loss_type="dapo",
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            learning_rate=3e-4,
        )
        trainer = GRPOTrainer(
            model=transformers_model(),
            reward_funcs=lambda completions, **_: [float(len(text) % 7) for text in completions],
            args=settings,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=fast,
            callbacks=[Clock()],
        )
        trainer.train()
    return {"seconds": statistics.median(b - a for a, b in zip(times, times[1:], strict=False))}


WORKERS: dict[str, timing.Worker] = {"ours": _ours, "trl": _trl}
