"""`t5x_like evaluate DIR --tasks=...`: scores models on tasks of lm-evaluation-harness and on texts.

    t5x_like evaluate runs/tiny --tasks=local_hellaswag,local_lambada --data=~/eval-data --limit=100
    t5x_like evaluate runs/a runs/b --tasks=local_gsm8k --data=~/eval-data --output=reports/ab

DIR is a workdir, a model directory or a Hugging Face folder; a step is named DIR@STEP. Several are set side by side, with
paired differences from the first. docs/evaluation.md says what tasks there are and where they look for data.
"""

import datetime
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from t5x_like import __version__
from t5x_like.core import environment
from t5x_like.core.errors import UsageError
from t5x_like.runs.arguments import Parser

DATA_VARIABLE = "T5X_LIKE_EVAL_DATA"


def run(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    _check(options)
    environment.apply(environment.READING)
    from t5x_like.evaluation import harness, report, statistics  # import jax, whose environment now stands

    data = os.path.abspath(os.path.expanduser(options.data)) if options.data else ""
    settings = harness.Settings(options.limit, options.num_fewshot, options.batch_tokens, options.seed, options.chat)
    names = [name for name in options.tasks.split(",") if name]
    tasks = harness.Tasks(names, include=options.include_path, data=data)
    evaluations = []
    for directory in options.directories:
        began = time.monotonic()
        subject = _open(directory, options)
        evaluations.append(tasks.evaluate(subject, settings))
        print(f"{directory}: {time.monotonic() - began:.1f} s", file=sys.stderr)
    differences = {
        evaluation.model: statistics.differences(evaluations[0].metrics, evaluation.metrics)
        for evaluation in evaluations[1:]
    }
    found = report.Report(_facts(options), evaluations, differences)
    print(found.to_markdown(), end="")
    if options.output:
        report.write(found, options.output, samples=options.samples)
    return 0


def _parser() -> Parser:
    parser = Parser(prog="t5x_like evaluate", description=__doc__)
    add = parser.add_argument
    add("directories", nargs="+", metavar="DIR[@STEP]", help="workdir, model directory or Hugging Face folder")
    add("--tasks", default="", help="names of tasks, with commas between them; * and ? match")
    add("--include_path", action="append", default=[], help="folder of task files (*.yaml); may be repeated")
    add("--data", default=os.environ.get(DATA_VARIABLE, ""), help=f"folder of local data (default: ${DATA_VARIABLE})")
    add("--limit", type=int, help="documents of each task at most (default: all)")
    add("--num_fewshot", type=int, help="examples before each question (default: as the task says)")
    add("--chat", action="store_true", help="put requests through the tokenizer's chat template")
    add("--batch_tokens", type=int, default=4096, help="tokens of a batch (default 4096)")
    add("--seed", type=int, default=1234, help="of few-shot examples and of sampling (default 1234)")
    add("--dtype", default="compute", help="of matrices: compute (default), stored, or a name such as bfloat16")
    add("--ema", action="store_true", help="read the averaged parameters")
    add("--output", help="folder for report.json and report.md")
    add("--samples", action="store_true", help="write what was asked and answered into OUTPUT/samples")
    return parser


def _check(options: Any) -> None:
    if not options.tasks:
        raise UsageError("t5x_like evaluate: give --tasks=NAME,NAME")
    for name in ("limit", "batch_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name}={value} should be at least 1")
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise UsageError(f"--num_fewshot={options.num_fewshot} should not be negative")
    if not 0 <= options.seed < 2**32:
        raise UsageError(f"--seed={options.seed} should be from 0 to 2^32 - 1")
    if len(set(options.directories)) < len(options.directories):
        raise UsageError("t5x_like evaluate: a directory is given twice; give each once")
    if options.samples and not options.output:
        raise UsageError("--samples needs --output=FOLDER, where they are written")


def _open(directory: str, options: Any) -> Any:
    from t5x_like.convert.stored import open_model
    from t5x_like.evaluation import chat
    from t5x_like.evaluation.model import EvaluatedModel
    from t5x_like.language_model import load
    from t5x_like.storage import model_directory, paths

    place, step = model_directory.split(directory)
    loaded = load(place, step=step, ema=options.ema, dtype=options.dtype)
    folder = open_model(place).tokenizer_folder
    template = None
    if folder is not None:
        with paths.local_copy(folder) as local:
            template = chat.read(local)
    if options.chat and (template is None or not template.template):
        raise UsageError(f"{directory}: its tokenizer has no chat template; leave --chat out")
    chosen = template if options.chat else None
    return EvaluatedModel(
        directory, loaded.model, loaded.params, loaded.vocabulary, loaded.start_id, mesh=None, chat=chosen
    )


def _facts(options: Any) -> dict[str, Any]:
    import importlib.metadata

    versions = {name: importlib.metadata.version(name) for name in ("lm_eval", "jax")}
    asked = {
        name: getattr(options, name)
        for name in ("tasks", "limit", "num_fewshot", "chat", "batch_tokens", "seed", "dtype", "ema")
    }
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"date": date, "t5x_like": __version__, **versions, **asked}
