"""`t5x_like plan --config=FILE --topology=v5p:4x4x4`: what the TPU compiler says of a config, without a TPU.

    t5x_like plan --config=configs/pretrain/llama3_8b.py --topology=v5p:4x4x4
    t5x_like plan --config=... --topology=v5e:2x4 --program=decode --rows=32 --length=2048 --json=plan.json

Compiles the real train or decode step with abstract state and prints memory, estimated cycles and collectives. Opens
no file but the config, and of each model of config.roles what says its shapes. Needs the extra [tpu], on Linux x86-64.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from t5x_like.core import config as bridge
from t5x_like.core import environment
from t5x_like.core.errors import UsageError, UserError
from t5x_like.runs.arguments import ConfigParser, load_config, section, split_config
from t5x_like.storage import paths


def run(arguments: Sequence[str]) -> int:
    config_arguments, others = split_config(arguments)
    options = _parse(others)
    config, overrides = load_config(config_arguments)
    json_path = _writable(options.json) if options.json else None
    runtime = bridge.build(environment.RuntimeConfig, section(config, "runtime"), path="config.runtime")
    # Whatever machine the config is for: this one only compiles, on its CPU.
    environment.apply(dataclasses.replace(runtime, platform="cpu", fake_devices=0))

    from t5x_like.planner import report

    plan = _plan(config, overrides, options)
    if json_path:
        json_path.with_name(f"{json_path.name}.tmp").write_text(json.dumps(report.to_json(plan), indent=2) + "\n")
        os.replace(json_path.with_name(f"{json_path.name}.tmp"), json_path)
    print(report.to_text(plan, details=options.details))
    return 0


def _parse(arguments: Sequence[str]) -> Any:
    parser = ConfigParser(prog="t5x_like plan", description=__doc__)
    parser.add_argument("--topology", required=True, help="such as v5p:4x4x4, v5e:2x4, v6e:8x8, v4:2x2x4, tpu7x:2x2x2")
    parser.add_argument("--program", choices=("train", "decode"), default="train")
    parser.add_argument("--rows", type=int, help="decode: texts at once, over all devices")
    parser.add_argument("--length", type=int, help="decode: tokens of each text that the cache has room for")
    parser.add_argument("--json", metavar="PATH", help="also write the plan as JSON")
    parser.add_argument("--details", action="store_true", help="list every collective instruction by itself")
    options = parser.parse_args(arguments)
    sizes = (options.rows, options.length)
    if options.program == "decode" and not all(size and size > 0 for size in sizes):
        raise UsageError("--program=decode needs --rows and --length, both at least 1")
    if options.program == "train" and sizes != (None, None):
        raise UsageError("--rows and --length are for --program=decode; a train step has config.data.batch_size")
    return options


def _writable(path: str) -> pathlib.Path:
    """The path, if its folder is there: better said before minutes of compiling than after."""
    if paths.is_remote(path):
        raise UserError(f"--json={path}: a plan is written to a disk; copy it to its bucket afterwards")
    target = pathlib.Path(paths.normal(path))
    if not target.parent.is_dir():
        raise UserError(f"--json={path}: {target.parent} is no folder")
    return target


def _plan(config: Mapping[str, Any], overrides: Mapping[str, Any], options: Any) -> Any:
    from t5x_like.parallel import mesh as meshes
    from t5x_like.planner import topology as topologies
    from t5x_like.planner.compile import compile_program
    from t5x_like.planner.cost import cost
    from t5x_like.planner.report import Plan
    from t5x_like.runs import program as programs
    from t5x_like.runs import train

    experiment = train.from_config(config, overrides=overrides)
    topology = topologies.topology(options.topology)
    mesh = meshes.make(experiment.mesh, topology.devices)
    if options.program == "train":
        programs.check_mesh(experiment, mesh.shape)
        program = programs.step_program(experiment, mesh)
        step, step_arguments = program.step, (program.layout.state, program.layout.frozen, program.batch)
    else:
        step, step_arguments = programs.decode_program(experiment, mesh, rows=options.rows, length=options.length)
    compiled = compile_program(step, step_arguments, mesh=mesh)
    sizes = dict(mesh.shape)
    return Plan(options.program, topology.name, topology.chips, sizes, compiled, cost(compiled.text, sizes))
