"""`t5x_like plan --budget`: how large a model and how many tokens, by published fits; memory before any compile.

    t5x_like plan --budget --flops=1e22
    t5x_like plan --budget --chips=v5p:4x4x4 --days=14 --family=llama     size, tokens, mesh and overrides of a run
    t5x_like plan --budget --parameters=8B --tokens=15T --served=2T       over-training, and what serving changes
    t5x_like plan --budget --config=configs/pretrain/llama3_8b.py --chips=v5p:4x4x4     memory by part, days

The compute is said in one of these ways. Needs no compiler. All figures are estimates, labelled by their source.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

from t5x_like.commands import plan_file
from t5x_like.core import accelerators, environment
from t5x_like.core.errors import UsageError
from t5x_like.core.terminal import format_count, format_duration
from t5x_like.planner.sizes import budget, budget_report
from t5x_like.planner.sizes.budget_report import Budget, Memory, Row, Run
from t5x_like.runs.arguments import ConfigParser, load_config, split_config

_DAY = 86_400
_FACTORS = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_MFU = 0.4
# Bounds of what is asked, far beyond any use, within which no estimate overflows.
_LEAST, _MOST = 1e-6, 1e40


def run(arguments: Sequence[str]) -> int:
    config_arguments, others = split_config(arguments)
    options = _parse(others)
    has_config = any(argument.startswith("--config=") for argument in config_arguments)
    if config_arguments and not has_config:
        raise UsageError(f"{config_arguments[0]} changes a config, and none is named; give --config=FILE")
    chips = None if options.chips is None else _slice(options.chips)
    _check(options, has_config=has_config)
    path = plan_file.writable(options.json) if options.json else None
    if has_config:
        found = _of_config(config_arguments, options, chips)
    elif options.family:
        found = _of_family(options, chips)
    else:
        flops, origin, given = _compute(options, chips)
        found = Budget(flops, origin, given, served=options.served)
    print(budget_report.to_text(found))
    if path:
        plan_file.write_json(path, budget_report.to_json(found))
    return 0


def _parse(arguments: Sequence[str]) -> Any:
    parser = ConfigParser(prog="t5x_like plan --budget", description=__doc__)
    parser.add_argument("--budget", action="store_true")
    parser.add_argument("--flops", type=_number("--flops"), help="of training, such as 1e22")
    parser.add_argument("--chips", help="a slice of TPUs, such as v5p:4x4x4")
    parser.add_argument("--days", type=_number("--days"), help="for which the chips are there")
    parser.add_argument("--mfu", type=_number("--mfu"), default=_MFU, help=f"assumed model FLOPs utilization; {_MFU}")
    parser.add_argument("--parameters", type=_number("--parameters"), help="of a model: 8B or 8e9")
    parser.add_argument("--tokens", type=_number("--tokens"), help="of its training: 15T or 15e12")
    parser.add_argument("--served", type=_number("--served"), default=0.0, help="tokens of inference over its life")
    parser.add_argument("--family", help="a model family, such as llama: which size, and a run of it on --chips")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row, for --family; default 4096")
    parser.add_argument("--json", metavar="PATH", help="also write everything as JSON")
    return parser.parse_args(arguments)


def _number(flag: str) -> Any:
    """A positive number with a factor behind it, as people write 8B and 15T."""

    def read(text: str) -> float:
        match = re.fullmatch(r"(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)([KMBT]?)", text.strip())
        value = float(match[1]) * _FACTORS[match[2]] if match else 0.0
        if not 0 < value < math.inf:
            raise UsageError(f"{flag}={text} should be a number above 0, such as 8e9 or 8B (K, M, B, T)")
        if not _LEAST <= value <= _MOST:
            raise UsageError(f"{flag}={text} should be from {_LEAST:g} to {_MOST:g}, such as 8e9 or 8B")
        return value

    return read


def _slice(name: str) -> accelerators.Slice:
    try:
        return accelerators.parse(name)
    except UsageError as error:
        raise UsageError(str(error).replace("--topology=", "--chips=")) from None


def _check(options: Any, *, has_config: bool) -> None:
    """One way of saying the compute, and nothing that would have no effect."""
    if options.mfu > 1:
        raise UsageError(f"--mfu={options.mfu:g} should be a share of the peak, above 0 and at most 1, such as 0.4")
    if options.length < 1:
        raise UsageError(f"--length={options.length} should be at least 1")
    ways = {
        "--config": has_config,
        "--flops": options.flops is not None,
        "--chips with --days": options.days is not None,
        "--parameters or --tokens": options.parameters is not None or options.tokens is not None,
    }
    chosen = [name for name, given in ways.items() if given]
    if len(chosen) != 1:
        said = f"{' and '.join(chosen)} say it twice" if chosen else "nothing says how much"
        raise UsageError(f"plan --budget: {said}; give one of {', '.join(ways)}")
    if options.days is not None and options.chips is None:
        raise UsageError(f"--days={options.days:g} needs --chips, such as --chips=v5p:4x4x4")
    if options.family and (has_config or chosen == ["--parameters or --tokens"]):
        raise UsageError(f"--family={options.family} chooses a size by compute; give --flops, or --chips and --days")


def _compute(options: Any, chips: accelerators.Slice | None) -> tuple[float, str, tuple[Any, ...]]:
    """(FLOPs, where they come from, the model that was asked about)."""
    fit = budget_report.first()
    if options.flops is not None:
        return options.flops, f"as given{_time(options.flops, chips, options.mfu)}", ()
    if options.days is not None:
        assert chips is not None, "_check has seen to it"
        rate = chips.chips * chips.row.peak
        words = f"{chips.chips} chips of {chips.spelled} ({chips.row.peak / 1e12:g} TFLOP/s each) for {options.days:g} "
        words += f"days at an assumed MFU of {options.mfu:.0%}"
        return rate * options.mfu * options.days * _DAY, words, ()
    parameters, tokens = options.parameters, options.tokens
    if parameters is not None and tokens is not None:
        given = budget_report.choices(parameters, tokens)
        flops = given[0].flops
        words = f"6 x {format_count(parameters)} parameters x {format_count(tokens)} tokens"
        return flops, words + _time(flops, chips, options.mfu), given
    if parameters is not None:
        flops = fit.of_parameters(parameters).flops
        words = f"for which {format_count(parameters)} parameters are best by {fit.name}"
    else:
        assert tokens is not None, "one of the three is given"
        flops = fit.of_tokens(tokens).flops
        words = f"for which {format_count(tokens)} tokens are best by {fit.name}"
    return flops, words + _time(flops, chips, options.mfu), ()


def _time(flops: float, chips: accelerators.Slice | None, mfu: float) -> str:
    if chips is None:
        return ""
    seconds = flops / (chips.chips * chips.row.peak * mfu)
    return f"; {format_duration(seconds)} on {chips.spelled} at an assumed MFU of {mfu:.0%}"


def _of_config(arguments: Sequence[str], options: Any, chips: accelerators.Slice | None) -> Budget:
    """The tokens and memory of a config, on --chips or the devices that its mesh names."""
    config, overrides = load_config(arguments)
    _on_cpu()
    from t5x_like.parallel import mesh as meshes
    from t5x_like.planner.sizes.footprint import Footprint
    from t5x_like.runs.planned import experiment_of, named_devices

    experiment = experiment_of(config, overrides)
    devices = named_devices(config) if chips is None else chips.devices
    sizes = meshes.axis_sizes(experiment.mesh, devices)
    footprints = _footprints(chips)
    by_remat: dict[str, Footprint] = {}
    for remat in dict.fromkeys([*_policies(), experiment.model.remat]):
        chosen = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, remat=remat))
        by_remat[remat] = footprints.of(chosen, sizes)
    data, program = experiment.data, footprints.program(experiment, sizes)
    parameters = program.model.parameter_count()
    tokens = float(experiment.loop.steps * data.batch_size * data.length)
    flops = tokens * program.model.flops_per_token(data.length, data.encoder_length).train
    words = f"{experiment.loop.steps:,} steps of {data.batch_size} x {data.length} tokens, attention included"
    batch = f"{data.batch_size} rows of {data.length} tokens"
    if experiment.loop.micro_batches > 1:
        batch += f" in {experiment.loop.micro_batches} micro-batches"
    hbm = None if chips is None else int(chips.row.hbm * 2**30)
    return Budget(
        flops,
        words + _time(flops, chips, options.mfu),
        budget_report.choices(parameters, tokens),
        served=options.served,
        memory=Memory(sizes, devices, hbm, batch, by_remat, experiment.model.remat),
    )


def _of_family(options: Any, chips: accelerators.Slice | None) -> Budget:
    """Sizes of a family at this compute, and a run of the best on the chips."""
    _on_cpu()
    from t5x_like.configs import common
    from t5x_like.runs import sizing

    flops, origin, _ = _compute(options, chips)
    section, fit = common.config().to_dict()["model"], budget_report.first()
    sizes = sizing.of_family(options.family, section, length=options.length)
    target = fit.of_flops(flops).parameters
    own = sizing.shaped(options.family, section, target, sizes, length=options.length)
    near = [each for each in sizes if target / 30 <= each.parameters <= target * 30]
    rows = []
    for each in sorted([*near, own], key=lambda each: each.parameters):
        tokens = flops / each.train_flops
        rows.append(Row(each.name, each.fields, budget_report.choices(each.parameters, tokens)))
    memory, placed = _run_of(options, chips, own, flops) if chips is not None else (None, None)
    return Budget(flops, origin, served=options.served, family=options.family, rows=rows, memory=memory, run=placed)


def _run_of(options: Any, chips: accelerators.Slice, own: Any, flops: float) -> tuple[Memory, Run]:
    """A run of this model on the chips: batch, mesh, remat and micro-batches by its footprint."""
    from t5x_like.configs import common
    from t5x_like.runs import sizing
    from t5x_like.runs.planned import experiment_of

    tokens = flops / own.train_flops
    rows = sizing.rows_of(budget.batch_tokens(flops) / options.length, chips.devices)
    steps = max(round(tokens / (rows * options.length)), 1)
    fields = {f"model.{name}": value for name, value in own.fields.items()}
    fields |= {"data.batch_size": rows, "data.length": options.length, "loop.steps": steps}
    fields["optim.schedule.warmup_steps"] = min(2000, max(steps // 100, 1))
    config: Any = common.config()
    for path, value in fields.items():
        _set(config, path, value)
    hbm = int(chips.row.hbm * 2**30)
    placed = sizing.place(experiment_of(config.to_dict(), {}), chips.devices, hbm, _footprints(chips))
    chosen = placed.experiment
    fields |= {
        "model.remat": chosen.model.remat,
        "mesh.tensor": placed.sizes["tensor"],
        "loop.micro_batches": chosen.loop.micro_batches,
    }
    if chosen.mesh.tensor == 1:
        del fields["mesh.tensor"]
    mesh = " x ".join(f"{axis}={size}" for axis, size in placed.sizes.items() if size > 1) or "one device"
    seconds = flops / (chips.chips * chips.row.peak * options.mfu)
    facts = {
        "model": f"{format_count(own.parameters)} parameters, near the best by {budget_report.first().name}",
        "tokens": f"{format_count(tokens)}: {steps:,} steps of {rows} x {options.length} tokens",
        "batch": f"{format_count(rows * options.length)} tokens, near the fit of arXiv 2401.02954",
        "mesh": f"{mesh} on {chips.spelled}, remat {chosen.model.remat}, {chosen.loop.micro_batches} micro-batches",
        "time": f"{format_duration(seconds)} at an assumed MFU of {options.mfu:.0%}",
    }
    batch = f"{rows} rows of {options.length} tokens in {chosen.loop.micro_batches} micro-batches"
    by_remat = {chosen.model.remat: placed.footprint}
    memory = Memory(placed.sizes, chips.devices, hbm, batch, by_remat, chosen.model.remat)
    flags = [f"--config.{path}={value}" for path, value in fields.items()]
    return memory, Run([*flags, f"--topology={chips.spelled}"], facts)


def _set(config: Any, path: str, value: Any) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        config = config[parent]
    config[name] = value


def _footprints(chips: accelerators.Slice | None) -> Any:
    from t5x_like.runs.footprint import Footprints

    return Footprints(platform="tpu", kind=accelerators.device_kind("v5p" if chips is None else chips.generation))


def _policies() -> list[str]:
    from t5x_like.layers.remat import POLICIES

    return list(POLICIES)


def _on_cpu() -> None:
    """Whatever machine the config is for: this one only traces, on its CPU."""
    environment.apply(dataclasses.replace(environment.READING, platform="cpu", fake_devices=0))
