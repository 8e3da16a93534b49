"""`t5x_like train --config=FILE --workdir=DIR`: trains a model, or resumes the run that DIR holds.

    t5x_like train --config=configs/pretrain/tiny.py --workdir=runs/tiny --config.loop.steps=500
    t5x_like train --workdir=runs/tiny [--config.loop.steps=2000]    resumes from its config.json
    t5x_like train --config=... --workdir=... --check    builds everything, prints the summary and exits

Exit status 75: the run was asked to stop and has saved; start it again.
"""

import argparse
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from t5x_like.core import config as bridge
from t5x_like.core import environment
from t5x_like.core.errors import UsageError
from t5x_like.runs.arguments import ConfigParser, load_config, override, section, split_config


@dataclasses.dataclass(frozen=True)
class Started:
    """What a command that runs a config knows before jax is imported. stored: the config of the run that is resumed."""

    options: argparse.Namespace
    config: dict[str, Any]
    overrides: dict[str, Any]
    stored: dict[str, Any] | None
    environment: environment.Environment


def run(arguments: Sequence[str]) -> int:
    started = begin(arguments, prog="t5x_like train", description=__doc__, own="")

    from t5x_like.runs import training_run
    from t5x_like.training.session import Request

    return training_run.run(
        Request(**vars(started.options)),
        config=started.config,
        overrides=started.overrides,
        stored=started.stored,
        environment=started.environment,
    )


def begin(arguments: Sequence[str], *, prog: str, description: str | None, own: str) -> Started:
    """Reads arguments and configs, and puts the environment in force: threads and devices are fixed when jax starts.

    own: the section that only configs of this command have, "" for none.
    """
    began = time.time()
    config_arguments, others = split_config(arguments)
    options = _parse(others, prog=prog, description=description)
    options.began = began
    # Light imports only until the environment stands: threads and devices are fixed when jax starts.
    from t5x_like.storage import patterns
    from t5x_like.storage import workdir as workdirs

    begins = any(argument.startswith("--config=") for argument in config_arguments)
    if not begins:  # a run that is there already
        options.workdir = patterns.one(options.workdir, what="--workdir=")
    stored = workdirs.read_config(options.workdir)
    if begins:
        config, overrides = load_config(config_arguments)
    elif stored is not None:
        config, overrides = override(stored, config_arguments)
    else:
        raise UsageError(f"--workdir={options.workdir} holds no config.json to resume; give --config=FILE")
    if ("rl" in config) != (own == "rl"):
        command = "rl" if "rl" in config else "train"
        raise UsageError(f"{prog}: this config is one of `t5x_like {command}`; start it by that")
    runtime = bridge.build(environment.RuntimeConfig, section(config, "runtime"), path="config.runtime")
    threads = workdirs.recorded_threads(options.workdir) or _threads_of_branch(config)
    in_force = environment.apply(runtime, recorded_threads=threads)
    return Started(options, config, overrides, stored, in_force)


def _threads_of_branch(config: Mapping[str, Any]) -> int | None:
    """The thread count of the run that a new one branches from, for equal bits; None where that is not known."""
    from t5x_like.storage import model_directory
    from t5x_like.storage import workdir as workdirs

    given = section(config, "checkpoint").get("branch_from")
    if not isinstance(given, str):
        return None
    return workdirs.recorded_threads(model_directory.named(given, what="config.checkpoint.branch_from=")[0])


def _parse(arguments: Sequence[str], *, prog: str, description: str | None) -> argparse.Namespace:
    parser = ConfigParser(prog=prog, description=description)
    parser.add_argument("--workdir", required=True, help="folder of the run, local or gs://")
    parser.add_argument("--check", action="store_true", help="build, print the summary, and exit")
    parser.add_argument(
        "--coordinator", help="HOST:PORT of process 0, for several processes outside of a known cluster"
    )
    parser.add_argument("--process_id", type=int, help="number of this process, from 0")
    parser.add_argument("--num_processes", type=int, help="how many processes the run has")
    return parser.parse_args(arguments)
