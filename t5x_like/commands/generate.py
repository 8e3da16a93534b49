"""`t5x_like generate DIR --prompt=TEXT`: continues text with a model directory. Prints prompt and continuation.

A model with an encoder (T5) reads the prompt as its source and answers it: the answer alone is printed. Where it was
trained by span corruption, <extra_id_0>, <extra_id_1>, ... in the prompt are gaps, and the answer fills them.

With --chat the prompt is what a user says, or a whole conversation as JSON (a list of {"role", "content"}), written by
the chat template that the model was trained with; the assistant's answer is printed.
"""

import json
import sys
from typing import Any

from t5x_like.core import environment
from t5x_like.core.errors import UsageError
from t5x_like.runs.arguments import Parser
from t5x_like.storage import patterns


def run(arguments: list[str]) -> int:
    parser = Parser(prog="t5x_like generate", description=__doc__)
    parser.add_argument("directory", help="workdir, checkpointed model or converted model")
    parser.add_argument("--prompt", action="append", help="text to continue; may be repeated; - reads standard input")
    parser.add_argument("--chat", action="store_true", help="the prompt is what a user says to the assistant")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="tokens to add at most (default 128)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default 1)")
    parser.add_argument("--top_k", type=int, default=0, help="keep the k most probable tokens; 0 is off (default)")
    parser.add_argument("--top_p", type=float, default=1.0, help="keep the smallest set of this probability; 1 is off")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default 0)")
    parser.add_argument("--prefix", default="", help="what every answer of a model with an encoder begins with")
    parser.add_argument(
        "--beyond_max_length", action="store_true", help="let positions go on past the model's max_length"
    )
    parser.add_argument("--checkpoint", type=int, help="step of the checkpoint to read (default: the newest)")
    parser.add_argument("--base", help="of an adapter: where its base lies now, if not where it lay")
    parser.add_argument("--ema", action="store_true", help="read the averaged parameters")
    parser.add_argument(
        "--dtype", default="compute", help="how matrices are held: compute (default), stored, float32, bfloat16, int8"
    )
    options = parser.parse_args(arguments)
    if options.chat and options.prefix:
        raise UsageError("t5x_like generate: --prefix does not go with --chat, whose template begins an answer")
    if not options.prompt:
        raise UsageError("t5x_like generate: give at least one --prompt=TEXT")
    if not 0 <= options.seed < 2**32:
        raise UsageError(f"--seed={options.seed} should be from 0 to 2^32 - 1")
    prompts = [_standard_input() if prompt == "-" else prompt for prompt in options.prompt]

    environment.apply(environment.READING)
    from t5x_like.language_model import load  # imports jax, whose environment now stands

    directory = patterns.one(options.directory, what="DIR=")
    model = load(directory, step=options.checkpoint, ema=options.ema, dtype=options.dtype, base=options.base)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "beyond_max_length")
    given = {name: getattr(options, name) for name in names}
    if options.chat:
        texts = model.chat([_conversation(prompt) for prompt in prompts], **given)
    else:
        texts = model.generate(prompts, prefix=options.prefix, **given)
    for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        if index:
            print("-" * 40)
        begin = options.prefix if model.has_encoder else prompt
        print(text if options.chat else begin + text)
    return 0


def _conversation(prompt: str) -> list[dict[str, Any]]:
    """The messages of a prompt that is a JSON list, else one message of the user."""
    if prompt.lstrip().startswith("["):
        try:
            return json.loads(prompt)
        except ValueError:
            pass  # a text that begins with a bracket
    return [{"role": "user", "content": prompt}]


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompt=-: standard input is no UTF-8 at byte {error.start}") from None
