"""Measures this program beside its peers in one run, and prints tables. A measurement, not a test: it asserts nothing.

    python -m tools.benchmark step       a training step of a 30M Llama: ours, torch + transformers, matmul peak
    python -m tools.benchmark t5_step    a training step of a 30M T5: ours, torch + transformers
    python -m tools.benchmark sft_step   a step of instruction tuning on packed conversations: ours, TRL
    python -m tools.benchmark lora_step  the same of all parameters and of LoRA: time and memory
    python -m tools.benchmark decode     greedy text of the 30M Llama, 1 and 16 rows: ours, transformers' generate
    python -m tools.benchmark evaluate   scores of the 30M Llama: ours, lm_eval on transformers, a forward pass
    python -m tools.benchmark int8       greedy text of a 300M Llama in int8, 1 and 16 rows: ours in both, transformers
    python -m tools.benchmark grpo       an iteration of GRPO of the 30M Llama: ours, TRL
    python -m tools.benchmark convert    1 GB from and to Hugging Face's form, beside copying its files
    python -m tools.benchmark input      prepare and read rates, beside SeqIO and beside what a step consumes
    python -m tools.benchmark save       how long asynchronous saving stalls the loop
    python -m tools.benchmark imports    import and --help
    python -m tools.benchmark            all of them

Each figure is the median over rounds; the rounds of peers are taken in turns, so that a busy machine slows all of them.
Needs the [test] extra (torch and transformers; `input` leaves SeqIO out where it is not installed).
"""

import argparse
import json
import sys

from tools.benchmark import (
    convert,
    decode,
    evaluate,
    grpo,
    imports,
    input,
    int8,
    lora_step,
    save,
    sft_step,
    step,
    t5_step,
    timing,
)

MEASUREMENTS = {
    "step": step.measure,
    "t5_step": t5_step.measure,
    "sft_step": sft_step.measure,
    "lora_step": lora_step.measure,
    "decode": decode.measure,
    "evaluate": evaluate.measure,
    "int8": int8.measure,
    "grpo": grpo.measure,
    "convert": convert.measure,
    "input": input.measure,
    "save": save.measure,
    "imports": imports.measure,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", choices=[*MEASUREMENTS, []], help="measurements to take (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each peer (default 5)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a round (default 5)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--values", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        timing.answer(options.worker, options.values)
        return 0
    for name in options.what or MEASUREMENTS:
        MEASUREMENTS[name](options.rounds, options.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
