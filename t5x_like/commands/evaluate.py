"""`t5x_like evaluate DIR --tasks=... --text=...`: scores models on tasks of lm-evaluation-harness and on texts.

    t5x_like evaluate runs/tiny --tasks=local_hellaswag,local_lambada --data=~/eval-data --limit=100
    t5x_like evaluate runs/a runs/b --text=held-out.txt --output=reports/ab
    t5x_like evaluate runs/b --tasks=local_gsm8k --fail_if_worse=reports/a/report.json

DIR is a workdir, a model directory or a Hugging Face folder; DIR@STEP names a checkpoint. Several models stand side by
side, with paired differences from the first. docs/evaluation.md says which tasks there are and where their data lie.
"""

import datetime
import importlib.metadata
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from t5x_like import __version__
from t5x_like.core import environment
from t5x_like.core.errors import UsageError, UserError
from t5x_like.runs.arguments import Parser

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from t5x_like.evaluation.model import EvaluatedModel
    from t5x_like.evaluation.results import Evaluation

DATA_VARIABLE = "T5X_LIKE_EVAL_DATA"


def run(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    _check(options)
    environment.apply(environment.READING)
    from t5x_like.evaluation import report, statistics  # import jax, whose environment now stands

    reference: Evaluation | None = None
    if options.fail_if_worse.endswith(".json"):
        reference = report.read(options.fail_if_worse)
        _check_settings(options, reference, report.facts(options.fail_if_worse))
    evaluate, names = _evaluation(options), list(options.directories)
    if options.fail_if_worse and reference is None:
        reference = evaluate(options.fail_if_worse)
    found = [*([] if reference is None else [reference]), *(evaluate(name) for name in names)]
    differences = {each.model: statistics.differences(found[0].metrics, each.metrics) for each in found[1:]}
    whole = report.Report(_facts(options), found, differences)
    print(whole.to_markdown(), end="")
    for line in whole.without_number():
        print(line, file=sys.stderr)
    for line in [] if reference is None else _missing(reference, found[1:]):
        print(line, file=sys.stderr)
    if options.output:
        report.write(whole, options.output, samples=options.samples)
    return 0 if reference is None else _judged(reference, differences, options.errors)


def _parser() -> Parser:
    parser = Parser(prog="t5x_like evaluate", description=__doc__)
    add = parser.add_argument
    add("directories", nargs="+", metavar="DIR[@STEP]", help="workdir, model directory or Hugging Face folder")
    add("--tasks", default="", help="names of tasks with commas between them; * and ? match")
    add("--text", action="append", default=[], help="a text: a file, folder or KIND:PATH; may be repeated")
    add("--length", type=int, help="tokens of a row of --text (default: as the run of each model has it)")
    add("--include_path", action="append", default=[], help="folder of task files (*.yaml); may be repeated")
    add("--data", default=os.environ.get(DATA_VARIABLE, ""), help=f"folder of local data (default: ${DATA_VARIABLE})")
    add("--limit", type=int, help="documents of each task at most (default: all)")
    add("--num_fewshot", type=int, help="examples before each question (default: as the task says)")
    add("--gen_kwargs", default="", help="generation_kwargs of all tasks, as max_gen_toks=64,temperature=0.7")
    add("--chat", action="store_true", help="put requests through the model's chat template")
    add("--batch_tokens", type=int, default=2048, help="tokens of a batch (default 2048; more for an accelerator)")
    add("--seed", type=int, default=1234, help="of few-shot examples and of sampling (default 1234)")
    add("--dtype", default="compute", help="of matrices: compute (default), stored, or a name such as bfloat16")
    add("--ema", action="store_true", help="read the averaged parameters")
    add("--mesh", default="", help="several devices: a preset, sizes of axes, or both: fsdp,tensor=2 (default: one)")
    add("--output", help="folder for report.json and report.md")
    add("--samples", action="store_true", help="write what was asked and answered into OUTPUT/samples")
    add("--fail_if_worse", default="", metavar="REFERENCE", help="a report.json or a DIR; status 1 if any is worse")
    add("--errors", type=float, default=2.0, help="worse: by more than so many paired standard errors (default 2)")
    return parser


def _check(options: Any) -> None:
    if not options.tasks and not options.text:
        raise UsageError("t5x_like evaluate: give --tasks=NAME,NAME or --text=PATH")
    for name in ("limit", "length", "batch_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name}={value} should be at least 1")
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise UsageError(f"--num_fewshot={options.num_fewshot} should not be negative")
    if not 0 <= options.seed < 2**32:
        raise UsageError(f"--seed={options.seed} should be from 0 to 2^32 - 1")
    if not 0 <= options.errors < float("inf"):
        raise UsageError(f"--errors={options.errors:g} should be a number of standard errors, 0 or more")
    given = [*options.directories, *([options.fail_if_worse] if options.fail_if_worse else [])]
    if len(set(given)) < len(given):
        raise UsageError("t5x_like evaluate: a model is given twice; give each once")
    if options.samples and not options.output:
        raise UsageError("--samples needs --output=FOLDER, where they are written")


def _evaluation(options: Any) -> Any:
    """A function from a directory to what was found about its model. Texts and names of tasks are looked up here."""
    from t5x_like.configs import common
    from t5x_like.data.write import sources
    from t5x_like.evaluation import harness, text

    texts = [text.source_of(each) for each in options.text]
    for each in texts:
        sources.parse(each, where="--text")
    names = [name for name in options.tasks.split(",") if name]
    data = os.path.abspath(os.path.expanduser(options.data)) if options.data else ""
    tasks = harness.Tasks(names, include=options.include_path, data=data) if names else None
    settings = harness.Settings(
        limit=options.limit,
        shots=options.num_fewshot,
        generation=options.gen_kwargs,
        chat=options.chat,
        batch_tokens=options.batch_tokens,
        seed=options.seed,
    )
    for line in [] if tasks is None else tasks.check(settings):
        print(line, file=sys.stderr)
    mesh, config = _mesh(options.mesh), common.config().to_dict()

    def evaluate(directory: str) -> "Evaluation":
        began = time.monotonic()
        subject, section = _open(directory, options, mesh)
        measured = [
            metric
            for each in texts
            for metric in text.measure(
                subject,
                text.config_of(subject, section, each, usual=config["data"], length=options.length),
                name=each,
                batch_tokens=options.batch_tokens,
            )
        ]
        found = harness.nothing(subject) if tasks is None else tasks.evaluate(subject, settings)
        print(f"{directory}: {time.monotonic() - began:.1f} s", file=sys.stderr)
        return harness.with_metrics(found, measured)

    return evaluate


def _open(directory: str, options: Any, mesh: "Mesh | None") -> "tuple[EvaluatedModel, Any]":
    """The model, and the `data` section of its run, None where it has none."""
    from t5x_like.convert.stored import open_model
    from t5x_like.evaluation import chat
    from t5x_like.evaluation.model import EvaluatedModel
    from t5x_like.language_model import load
    from t5x_like.storage import model_directory

    place, step = model_directory.split(directory)
    loaded = load(place, step=step, ema=options.ema, dtype=options.dtype, mesh=mesh)
    stored = open_model(place, adapters=True)
    if options.chat and not loaded.vocabulary.chat_template:
        raise UserError(f"{directory}: it has no chat template, by its run or beside its tokenizer; leave --chat out")
    asked = chat.Requests(loaded.template) if options.chat else None
    section = None
    if stored.step is not None:
        section = model_directory.read_metadata(stored.directory)["config"].get("data")
    subject = EvaluatedModel.of(
        directory,
        loaded.model,
        loaded.params,
        loaded.vocabulary,
        start_id=loaded.start_id,
        mesh=mesh,
        chat=asked,
        ends=loaded.ends,
    )
    return subject, section


def _mesh(text: str) -> "Mesh | None":
    """Of `fsdp`, `tensor=2` or both: a preset and sizes of axes; no text is one device."""
    if not text:
        return None
    from t5x_like.parallel import mesh as meshes
    from t5x_like.parallel.pipeline import NEUTRAL
    from t5x_like.parallel.rules import MESH_AXES

    sizes: dict[str, int | None] = dict.fromkeys(MESH_AXES)
    preset = "data"
    for part in text.split(","):
        axis, given, size = part.partition("=")
        if not given:
            preset = part
        elif axis in sizes and size.lstrip("-").isdecimal():
            sizes[axis] = int(size)
        else:
            raise UsageError(f"--mesh={text}: {part!r} should be AXIS=SIZE, AXIS one of {', '.join(MESH_AXES)}")
    return meshes.make(meshes.MeshConfig(preset=preset, rules="", pipeline=NEUTRAL, **sizes))


# What changes the questions of tasks, or how they are answered.
_SETTINGS = ("limit", "num_fewshot", "gen_kwargs", "chat", "seed")


def _check_settings(options: Any, reference: "Evaluation", facts: dict[str, Any]) -> None:
    """Raises UsageError where tasks of a stored report were asked in another way."""
    if not options.tasks or not reference.shots:
        return
    for name in _SETTINGS:
        before, now = (None if each in ("", False) else each for each in (facts.get(name), getattr(options, name)))
        if before != now:
            raise UsageError(
                f"--fail_if_worse={options.fail_if_worse}: its tasks were asked with {name}={before}, and here it is "
                f"{now}; give --{name} as there, or evaluate that model again"
            )


def _missing(reference: "Evaluation", found: "list[Evaluation]") -> list[str]:
    """A line for each metric that only one side has, or of which documents are; UsageError for a task with another
    number of examples."""
    lines = []
    known = {metric.key: metric for metric in reference.metrics}
    for evaluation in found:
        for task, shots in evaluation.shots.items():
            if reference.shots.get(task, shots) != shots:
                raise UsageError(
                    f"--fail_if_worse={reference.model}: {task} was asked after {reference.shots[task]} examples "
                    f"there, after {shots} of {evaluation.model}; give --num_fewshot as there"
                )
        own = {metric.key: metric for metric in evaluation.metrics}
        for key in sorted(known.keys() - own.keys()):
            lines.append(f"{key[0]} {key[1]}: only {reference.model} has it, not compared")
        for key in sorted(own.keys() - known.keys()):
            lines.append(f"{key[0]} {key[1]}: only {evaluation.model} has it, not compared")
        for key, metric in own.items():
            before = known[key].documents if key in known else metric.documents
            shared = len(set(before) & set(metric.documents))
            if shared < max(len(before), len(metric.documents)):
                lines.append(
                    f"{key[0]} {key[1]}: {reference.model} has {len(before)} documents, {evaluation.model} "
                    f"{len(metric.documents)}, and {shared} are the same and compared; evaluate both on the same files"
                )
    return lines


def _judged(reference: "Evaluation", differences: Any, errors: float) -> int:
    """Says what is worse than the reference; the exit status."""
    judged = [(name, each) for name, found in differences.items() for each in found if each.worse_by is not None]
    if not judged:
        raise UserError(f"--fail_if_worse={reference.model}: it shares no document of any metric with this evaluation")
    worse = [(name, each) for name, each in judged if each.is_worse(errors)]
    for name, each in worse:
        spread = "no standard error" if each.error is None else f"a standard error of {each.error:.4g}"
        by = "is no number" if math.isnan(each.value) else f"is worse by {each.worse_by:.4g}"
        print(f"{name}: {each.task} {each.name} {by}, with {spread}", file=sys.stderr)
    print(f"{len(worse)} of {len(judged)} metrics worse by more than {errors:g} standard errors", file=sys.stderr)
    return 1 if worse else 0


def _facts(options: Any) -> dict[str, Any]:
    """What was asked for, by which versions."""
    packages = ("jax", "lm_eval") if options.tasks else ("jax",)
    names = (
        "tasks",
        "text",
        "length",
        "limit",
        "num_fewshot",
        "gen_kwargs",
        "chat",
        "batch_tokens",
        "seed",
        "dtype",
        "ema",
        "mesh",
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "t5x_like": __version__,
        **{name: importlib.metadata.version(name) for name in packages},
        **{name: getattr(options, name) for name in names if getattr(options, name) not in ("", None, [], False)},
    }
