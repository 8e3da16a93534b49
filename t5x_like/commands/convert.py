"""`t5x_like convert SRC DST`: a model directory of ours into a Hugging Face folder, or the other way.

    t5x_like convert ~/models/Llama-3.2-1B runs/llama         from Hugging Face: ready for load, generate, init_from
    t5x_like convert runs/tiny out/tiny --dtype=bfloat16      a trained model for transformers, vLLM or llama.cpp
    t5x_like convert runs/lora out/lora                       the same of an adapter, merged into its base
    t5x_like convert runs/lora out/merged --to=native         merged, as a model directory of ours
    t5x_like convert runs/lora out/adapter --to=peft          the adapter alone, for the peft package
    t5x_like convert adapter runs/lora --base=runs/llama      one of peft's, on a model directory of ours
    t5x_like convert out/merged runs/base --unmerge=runs/lora its base again, up to the rounding of the merged weights

The form of SRC is seen from its files. Memory stays at a few hundred MB, whatever the size of the model.
"""

import argparse
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
    parser.add_argument("--to", choices=("native", "hf", "peft"), help="form to write (default: the other one)")
    parser.add_argument("--base", help="of an adapter that peft saved: the model directory that it was trained on")
    parser.add_argument("--unmerge", metavar="ADAPTER", help="takes the adapter of this directory out of SRC's weights")
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
    if _is_about_adapters(options):
        return _adapter(options)
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


def _is_about_adapters(options: argparse.Namespace) -> bool:
    from t5x_like.convert import foreign, peft_format
    from t5x_like.peft.attach import has_adapter
    from t5x_like.storage import model_directory

    if options.base is not None or options.unmerge is not None or options.to == "peft":
        return True
    if peft_format.is_adapter(options.source):
        raise UsageError(f"{options.source} is an adapter of peft's; give the model of ours that it is on as --base")
    if foreign.is_foreign(options.source):
        return False
    place = model_directory.locate(options.source, step=options.checkpoint)
    return has_adapter(model_directory.read_metadata(place.checkpoint)["config"])


def _adapter(options: argparse.Namespace) -> int:
    """Conversions in which an adapter is read, written, or merged."""
    from t5x_like.convert import convert, peft_format, verify
    from t5x_like.language_model import load
    from t5x_like.runs import adapters
    from t5x_like.storage import model_directory

    item = "ema" if options.ema else "params"
    if options.verify and (options.base is not None or options.to == "peft" or options.unmerge is not None):
        raise UsageError("--verify compares an adapter on its base with what it was merged into; leave it out here")
    if options.base is not None:
        if not peft_format.is_adapter(options.source):
            raise UsageError(f"{options.source} has no {peft_format.CONFIG}; --base is for an adapter that peft saved")
        adapters.from_peft(options.source, options.target, base=options.base)
    elif options.to == "peft":
        adapters.to_peft(options.source, options.target, step=options.checkpoint, item=item)
    else:
        holder, sign = (options.source, 1) if options.unmerge is None else (options.unmerge, -1)
        step = options.checkpoint if options.unmerge is None else None
        holder_at = model_directory.locate(holder, step=step).checkpoint
        merge = adapters.merge(holder_at, item, sign=sign)
        if options.unmerge is not None:
            given = {"step": options.checkpoint, "item": item, "taking_out": adapters.merge(holder_at, item, sign=-1)}
            told = adapters.check_merged(options.source, adapter=holder_at, **given)
            print(told, end="\n" if told else "")
        chosen = {"dtype": options.dtype, "step": options.checkpoint, "item": item, "change": merge}
        if options.to == "native" or options.unmerge is not None:
            convert.changed(options.source, options.target, provenance={"form": "merged"}, **chosen)
        else:
            convert.to_huggingface(options.source, options.target, **chosen)
        print(merge.report())
    print(options.target)
    if not options.verify:
        return 0
    adapted = load(options.source, step=options.checkpoint, ema=options.ema, dtype="float32")
    merged = load(options.target, dtype="float32")
    difference = verify.between(adapted.params, merged.params, adapted.model)
    print(
        f"largest difference of logits, merged and not: {difference:.2g} of the largest (limit {verify.SHARE:g} for "
        "weights in float32)"
    )
    stored = merged.model.dtypes.params
    return 0 if difference <= verify.SHARE or stored != "float32" else 1
