"""`t5x_like plan --config=FILE --topology=v5p:4x4x4`: what the TPU compiler says of a config, without a TPU.

    t5x_like plan --config=configs/pretrain/llama3_8b.py --topology=v5p:4x4x4
    t5x_like plan --config=configs/rl/llama3_8b_grpo.py --topology=v5p:4x4x4 --json=plan.json
    t5x_like plan --config=... --topology=v5e:2x4 --program=decode --rows=32 --length=2048

Compiles the real train step, the prefill of prompts, the step that decodes a token, or all programs of an iteration of
`t5x_like rl`, with abstract state, and prints memory, estimated cycles and collectives. Opens no file but the config,
and of each model of config.roles what says its shapes; a role that is not there is taken to be like the policy. Needs
the extra [tpu], on Linux x86-64.
"""

import dataclasses
import functools
import math
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from t5x_like.commands import plan_file, plan_search
from t5x_like.core import config as bridge
from t5x_like.core import environment
from t5x_like.core.errors import UsageError, UserError
from t5x_like.core.terminal import Waiting
from t5x_like.runs.arguments import ConfigParser, load_config, section, split_config
from t5x_like.storage import paths

PROGRAMS = ("train", "prefill", "decode", "rl")
OF_TEXTS = ("prefill", "decode")  # that are as large as --rows and --length say


def run(arguments: Sequence[str]) -> int:
    if "--budget" in arguments:
        from t5x_like.commands import plan_budget

        return plan_budget.run(arguments)
    if "--check" in arguments:
        from t5x_like.commands import plan_check

        return plan_check.run(arguments)
    config_arguments, others = split_config(arguments)
    dimensions, others = plan_search.split(others)
    options = _parse(others)
    plan_search.check(options, dimensions)
    config, overrides = load_config(config_arguments)
    program = _program(config, options.program)
    price = _price(options.price)
    targets = {
        name: plan_file.writable(getattr(options, name), option=name)
        for name in ("json", "html")
        if getattr(options, name)
    }
    if len(set(targets.values())) < len(targets):
        raise UsageError(f"--json and --html both write {options.json}; give two paths")
    runtime = bridge.build(environment.RuntimeConfig, section(config, "runtime"), path="config.runtime")
    # Whatever machine the config is for: this one only compiles, on its CPU.
    environment.apply(dataclasses.replace(runtime, platform="cpu", fake_devices=0))
    if options.search:
        if "rl" in config:
            raise UsageError("--search is of train steps, and this is a config of `t5x_like rl`; leave it out")
        return plan_search.run(config_arguments, dimensions, options)

    from t5x_like.planner import iteration, page, report

    plan: report.Plan | report.Refused | iteration.Iteration = _planned(program, config, overrides, options, price)
    details = options.details
    if isinstance(plan, iteration.Iteration):
        content, text = iteration.to_json(plan), iteration.to_text(plan, details=details)
    elif isinstance(plan, report.Refused):
        content, text = report.refused_json(plan), report.refused_text(plan)
    else:
        content, text = report.to_json(plan), report.to_text(plan, details=details)
    for name, path in targets.items():
        if name == "html":
            plan_file.write(path, page.page(content))
        else:
            plan_file.write_json(path, content)
    print(text)
    if plan.problems:
        raise UserError(f"{plan.place.topology} is too small: {'; '.join(plan.problems)}")
    return 0


def _parse(arguments: Sequence[str]) -> Any:
    parser = ConfigParser(prog="t5x_like plan", description=__doc__)
    parser.add_argument("--topology", required=True, help="a slice: v5p:4x4x4, v5p-128, v5litepod-16, ...")
    parser.add_argument("--slices", type=int, help="of this topology; default: config.mesh.slice, or 1")
    parser.add_argument("--program", choices=PROGRAMS, help="default: rl for a config of `t5x_like rl`, else train")
    parser.add_argument("--rows", type=int, help="prefill, decode: texts at once, over all devices")
    parser.add_argument(
        "--length",
        type=int,
        help="prefill, decode: tokens of each text that the cache has room for; a prefill reads so many",
    )
    parser.add_argument("--json", metavar="PATH", help="also write the plan as JSON")
    parser.add_argument("--html", metavar="PATH", help="also write it as one page with drawings")
    parser.add_argument(
        "--price", metavar="AMOUNT", help="of a chip for an hour, such as 4.20USD, for what a run costs"
    )
    parser.add_argument("--cache", metavar="DIR", help="of compiled programs; `off` for none; default: ~/.cache")
    parser.add_argument(
        "--default_options", action="store_true", help="with the compiler's own options, not the config's: often faster"
    )
    plan_search.add_flags(parser)
    parser.add_argument("--details", action="store_true", help="list the longest operations and every collective")
    options = parser.parse_args(arguments)
    sizes = (options.rows, options.length)
    if options.program in OF_TEXTS and not all(size and size > 0 for size in sizes):
        raise UsageError(f"--program={options.program} needs --rows and --length, both at least 1")
    if options.program not in OF_TEXTS and sizes != (None, None):
        raise UsageError(
            "--rows and --length are for --program=prefill and decode; a train step has config.data.batch_size"
        )
    return options


def _program(config: Mapping[str, Any], given: str | None) -> str:
    """What is planned: all programs of an iteration where the config is one of `t5x_like rl`, unless one is named."""
    of_rl = "rl" in config
    if given == "rl" and not of_rl:
        raise UsageError("--program=rl plans a config of `t5x_like rl`, and this one has no section rl; leave it out")
    return given or ("rl" if of_rl else "train")


def _price(text: str | None) -> tuple[float, str] | None:
    """(amount, currency) of a chip for an hour.

    >>> _price("4.20USD"), _price("3 EUR"), _price(None)
    ((4.2, 'USD'), (3.0, 'EUR'), None)
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+) ?([A-Za-z]{3})?", text.strip())
    if found is None or not 0 < float(found.group(1)) < math.inf:
        raise UsageError(f"--price={text} should be what a chip costs an hour, with its currency, such as 4.20USD")
    if not found.group(2):
        raise UsageError(f"--price={text} has no currency; write --price={text.strip()}USD, or another's three letters")
    return float(found.group(1)), found.group(2).upper()


def _planned(
    program: str, config: Mapping[str, Any], overrides: Mapping[str, Any], options: Any, price: tuple[float, str] | None
) -> Any:
    from t5x_like.parallel import mesh as meshes
    from t5x_like.planner import topology as topologies
    from t5x_like.planner.compile import DoesNotFit, compile_program
    from t5x_like.planner.report import Place, Plan, Refused
    from t5x_like.planner.time.cost import cost
    from t5x_like.runs import planned
    from t5x_like.runs import program as programs
    from t5x_like.runs.roles import open_or_assume

    experiment = planned.experiment_of(config, overrides)
    if options.default_options:
        experiment = _with_default_options(experiment)
    slices, mesh_config = _slices(options.slices, experiment.mesh)
    topology = topologies.topology(options.topology, slices=slices)
    mesh = meshes.make(mesh_config, topology.devices)
    place = Place(topology.name, topology.slices, topology.chips, dict(mesh.shape), topology.hbm_bytes)
    if program in OF_TEXTS:
        build, work_of = {
            "prefill": (programs.prefill_program, planned.prefill_work),
            "decode": (programs.decode_program, planned.decode_work),
        }[program]
        step, step_arguments = build(experiment, mesh, rows=options.rows, length=options.length)
        work = work_of(experiment, rows=options.rows, length=options.length)
        facts = [programs.facts_of_texts(experiment, program, rows=options.rows, length=options.length)]
    else:
        facts, place = [], dataclasses.replace(place, pipeline=programs.schedule(experiment, place.mesh))
        programs.check_mesh(experiment, mesh.shape)
        assumed: dict[str, str] = {}
        built = programs.step_program(experiment, mesh, opened=open_or_assume(experiment.model, assumed))
        for name, source in assumed.items():
            print(f"config.roles.{name}.source={source} is not there: taken to be like config.model", file=sys.stderr)
        if program == "rl":
            return _iteration(experiment, built, place, assumed, kept=_kept(options), price=price)
        step, step_arguments = built.step, (built.layout.state, built.layout.frozen, built.batch)
        work = planned.train_work(experiment, built)
    options_of = experiment.runtime.compiler_options.of("tpu")
    problem = ""
    try:
        compiled = compile_program(
            step,
            step_arguments,
            mesh=mesh,
            options=options_of,
            kept=_kept(options),
            anyway=True,
            stage=functools.partial(_waiting, f"the {program} step"),
        )
    except DoesNotFit as error:
        if error.compiled is None:
            return Refused(program, place, str(error), error.listed)
        compiled, problem = error.compiled, str(error)
    found = cost(compiled.text, place.mesh)
    return Plan(program, place, compiled, found, _estimate(found, mesh, place, work, price), problem, facts)


def _estimate(found: Any, mesh: Any, place: Any, work: Any, price: tuple[float, str] | None) -> Any:
    """The time of a program of this cost."""
    from t5x_like.planner.time.estimate import Price, estimate
    from t5x_like.planner.time.network import fabric

    return estimate(
        found,
        fabric(list(mesh.devices.flat), place.mesh),
        chips=place.chips,
        work=work,
        price=Price(*price) if price else None,
    )


def _slices(given: int | None, mesh: Any) -> tuple[int, Any]:
    """(slices, section mesh): either says how many where the other is silent. A run needs config.mesh.slice itself."""
    if given is None:
        return max(mesh.slice or 1, 1), mesh
    if mesh.slice is None and given > 1 and (mesh.stage or 1) == 1:
        print(f"planned with config.mesh.slice={given}, which train needs too", file=sys.stderr)
        mesh = dataclasses.replace(mesh, slice=given)
    return given, mesh


def _with_default_options(experiment: Any) -> Any:
    plain = dataclasses.replace(experiment.runtime.compiler_options, tpu={})
    return dataclasses.replace(experiment, runtime=dataclasses.replace(experiment.runtime, compiler_options=plain))


def _waiting(what: str, doing: str) -> Waiting:
    return Waiting(f"{doing} {what}")


def _kept(options: Any) -> pathlib.Path | None:
    """Where compiled programs lie, None for nowhere."""
    from t5x_like.planner import cache

    if options.cache == "off":
        return None
    if options.cache and paths.is_remote(options.cache):
        raise UsageError(f"--cache={options.cache}: compiled programs are kept on a disk; name a folder, or `off`")
    return pathlib.Path(paths.normal(options.cache)) if options.cache else cache.folder()


def _iteration(
    experiment: Any,
    built: Any,
    place: Any,
    assumed: Mapping[str, str],
    *,
    kept: pathlib.Path | None,
    price: tuple[float, str] | None,
) -> Any:
    """All programs of an iteration, compiled one after the other; one that does not fit does not hide the others."""
    from t5x_like.parallel.sharding import device_bytes
    from t5x_like.planner.compile import DoesNotFit, compile_program
    from t5x_like.planner.iteration import Iteration, Part
    from t5x_like.planner.time.cost import cost
    from t5x_like.runs import planned, rl_program

    rl_program.check_rows(experiment, place.mesh)
    run_bytes = device_bytes((built.layout.state, built.layout.frozen))
    stages, parts = rl_program.stages(experiment, built), []
    for number, stage in enumerate(stages, start=1):
        named = f"{stage.name}, {number} of {len(stages)}"
        found, problem, beside = None, "", run_bytes - device_bytes(stage.reads)
        try:
            compiled = compile_program(
                stage.step,
                stage.arguments,
                mesh=built.mesh,
                options=stage.options,
                kept=kept,
                anyway=True,
                stage=functools.partial(_waiting, named),
            )
        except DoesNotFit as error:
            compiled, problem = error.compiled, str(error)
        if compiled is not None:
            walked = cost(compiled.text, place.mesh)
            work = planned.stage_work(experiment, built, stage)
            found = (compiled, walked, _estimate(walked, built.mesh, place, work, price))
        parts.append(Part(stage.name, stage.does, stage.times, beside, found, problem))
    facts = [f"{name}: {fact}" for name, fact in rl_program.facts(experiment).items()]
    facts += [f"role {name}: {source} is not there, planned like config.model" for name, source in assumed.items()]
    return Iteration("rl", place, facts, parts, planned.iterations(experiment))
