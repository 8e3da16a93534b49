"""`t5x_like convert SRC DST`: a model directory of ours into a Hugging Face folder, or the other way.

    t5x_like convert ~/models/Llama-3.2-1B runs/llama         from Hugging Face: ready for load, generate, init_from
    t5x_like convert runs/tiny out/tiny --dtype=bfloat16      a trained model for transformers, vLLM or llama.cpp

The form of SRC is seen from its files. Memory stays at a few hundred MB, whatever the size of the model.
"""

from collections.abc import Sequence

from t5x_like.core import environment
from t5x_like.core.errors import UsageError
from t5x_like.runs.arguments import Parser
from t5x_like.storage import paths, patterns


def run(arguments: Sequence[str]) -> int:
    parser = Parser(prog="t5x_like convert", description=__doc__)
    parser.add_argument(
        "source", metavar="SRC", help="model directory, Hugging Face folder, llama2.c .bin, T5X checkpoint"
    )
    parser.add_argument("target", metavar="DST", help="folder to make")
    parser.add_argument("--to", choices=("native", "hf"), help="form to write (default: the other one)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as stored)")
    parser.add_argument("--checkpoint", type=int, help="step of the checkpoint to read (default: the newest)")
    parser.add_argument("--ema", action="store_true", help="read the averaged parameters")
    parser.add_argument(
        "--verify", action="store_true", help="compare logits with transformers on the Hugging Face side"
    )
    options = parser.parse_args(arguments)

    environment.apply(environment.READING)
    from t5x_like.convert import convert, foreign, verify  # imports jax, whose environment now stands

    options.source = patterns.one(options.source, what="SRC=")
    theirs = foreign.is_foreign(options.source)
    if options.verify and theirs and paths.is_remote(options.source):
        raise UsageError(
            "--verify loads SRC with transformers, which reads a disk; copy it there, or leave --verify out"
        )
    if options.to == ("hf" if theirs else "native"):
        raise UsageError(f"{options.source} has the form {options.to} already; leave --to out")
    if theirs and (options.checkpoint is not None or options.ema):
        raise UsageError("--checkpoint and --ema are about model directories of this program")
    if theirs:
        convert.to_native(options.source, options.target, dtype=options.dtype)
    else:
        item = "ema" if options.ema else "params"
        convert.to_huggingface(options.source, options.target, dtype=options.dtype, step=options.checkpoint, item=item)
    print(options.target)
    if not options.verify:
        return 0
    difference = verify.verify(options.source if theirs else options.target)
    print(f"largest difference of logits beside transformers, float32: {difference:.2g} (limit {verify.LIMIT:g})")
    return 0 if difference <= verify.LIMIT else 1
