"""`t5x_like export DIR OUT --format=FORM`: a model as a Hugging Face folder for others to use.

    --format=hf                   plain float tensors
    --format=compressed-tensors   the matrices of all layers in int8 with a scale for each output channel (W8A16), as
                                  vLLM and transformers read it

The folder holds tokenizer, model card (README.md) and checksums (SHA256SUMS). Memory stays at a few hundred MB.
"""

from collections.abc import Sequence

from t5x_like.core import environment
from t5x_like.runs.arguments import Parser


def run(arguments: Sequence[str]) -> int:
    parser = Parser(prog="t5x_like export", description=__doc__)
    parser.add_argument("directory", metavar="DIR", help="workdir, checkpointed model or converted model")
    parser.add_argument("target", metavar="OUT", help="folder to make")
    parser.add_argument("--format", required=True, help="hf or compressed-tensors")
    parser.add_argument("--dtype", help="of all that is no int8: float32, bfloat16 or float16 (default: as stored)")
    parser.add_argument("--checkpoint", type=int, help="step of the checkpoint to read (default: the newest)")
    parser.add_argument("--ema", action="store_true", help="read the averaged parameters")
    options = parser.parse_args(arguments)

    environment.apply(environment.READING)
    from t5x_like.compress import choice, quant_array  # imports jax, whose environment now stands
    from t5x_like.convert import export

    export.export(
        options.directory,
        options.target,
        form=options.format,
        int8=export.Int8(choice.dims, quant_array.quantized),
        dtype=options.dtype,
        step=options.checkpoint,
        item="ema" if options.ema else "params",
    )
    print(options.target)
    return 0
