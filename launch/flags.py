"""Command lines of the launchers: a Job from the config file's `get_launch()`, with flags on top.

    python -m launch.TARGET --config=FILE [--config.a.b=VALUE ...] --workdir=DIR [--topology=v5p:4x4x4 ...] [--dry_run]

The flags of a target are the fields of Job and of that target's own section, so that a field is written down once.
"""

import argparse
import dataclasses
import os
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launch import check
from launch import job as jobs
from launch.job import Job
from launch.submission import Submission, submit
from t5x_like.core import config as bridge
from t5x_like.core.errors import UsageError, UserError
from t5x_like.runs.arguments import ConfigParser, call_function, load_config, split_config

_DERIVED = ("command", "config")
_BROKEN_PIPE = 141  # as a shell says it of a program that SIGPIPE ended


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a command line asks of a launcher. dry_run: print everything, run nothing; check: look at the config too."""

    job: Job
    dry_run: bool
    check: bool


def main(launch: Callable[[Asked], int], arguments: Sequence[str] | None, *, target: str, about: str | None) -> int:
    """The exit status of `launch` for a command line; errors of the user become one line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = launch(read(given, target=target, about=about))
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"launch: {error}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to flush at exit
        return _BROKEN_PIPE


def read(arguments: Sequence[str], *, target: str, about: str | None = None) -> Asked:
    """The job of a command line; `target` names the launcher, whose section of Job has flags of its own."""
    config_arguments, others = split_config(arguments)
    options = vars(parser(target, about).parse_args(others))
    dry_run, check = options.pop("dry_run"), not options.pop("no_check")
    return Asked(describe(config_arguments, options, target=target), dry_run, check)


def carry_out(asked: Asked, submission: Submission) -> int:
    """Checks the run and submits it. A dry run prints first, since to look at a config takes some seconds."""
    if not asked.dry_run:
        check_run(asked)
        return submit(submission, dry_run=False)
    submit(submission, dry_run=True)
    check_run(asked)
    return 0


def check_run(asked: Asked) -> None:
    """UserError, in one line, where the run could not start there: its config, and the bucket that it writes to.

    The config is looked at as `train --check` does, without data, on as many devices as the job will have. A dry run
    writes nothing, so it does not try the bucket.
    """
    if not asked.check:
        return
    check.check_job(asked.job)
    if not asked.dry_run:
        jobs.check_writable(asked.job)


def describe(config_arguments: Sequence[str], options: Mapping[str, Any], *, target: str) -> Job:
    """The job of `--config...` arguments, the config file's get_launch() and values by name, which come last."""
    config, _ = load_config(config_arguments)
    found, given = call_function(config_arguments, "get_launch")
    given = given if found else {}
    if not isinstance(given, Mapping):
        raise UsageError(f"get_launch() should return a dict, not {type(given).__name__}")
    values = _merged(usual(), given, "get_launch()")
    for name, value in options.items():
        section = "" if name in values else section_of(target)
        place = values[section] if section else values
        place[name] = place[name] | value if isinstance(value, dict) else value
    values["command"] = "rl" if "rl" in config else "train"
    values["config"] = tuple(config_arguments)
    values["name"] = values["name"] or jobs.name_of(str(values["workdir"]))
    return bridge.build(Job, values, path="get_launch()")


def usual() -> dict[str, Any]:
    """The usual value of every field that has one; sections are dicts."""
    return _usual(Job)


def section_of(target: str) -> str:
    """The section of Job whose fields are flags of this target, "" for one that needs none."""
    return {"gke": "gke", "xpk": "gke", "slurm": "slurm", "gcloud": "gcloud"}.get(target, "")


def parser(target: str, about: str | None = None) -> argparse.ArgumentParser:
    """Takes every field of Job, those of the target's section, --dry_run and --no_check. Unset flags are absent."""
    found = ConfigParser(
        prog=f"python -m launch.{target}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    section = section_of(target)
    _add(found, Job)
    if section:
        _add(found, typing.cast(type, bridge.section_class(Job, section)))
    found.add_argument("--dry_run", action="store_true", help="print all that would be done, and do nothing")
    found.add_argument("--no_check", action="store_true", help="leave out what looks at the config and the bucket")
    return found


def _add(found: argparse.ArgumentParser, cls: type) -> None:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in _DERIVED or dataclasses.is_dataclass(hints[field.name]):
            continue
        usually = "" if field.default in ("", False, dataclasses.MISSING) else f" ({field.default})"
        options: dict[str, Any] = {"help": field.metadata["help"] + usually, "default": argparse.SUPPRESS}
        if hints[field.name] is bool:
            options |= {"action": argparse.BooleanOptionalAction}
        elif hints[field.name] is int:
            options |= {"type": int, "metavar": "N"}
        elif hints[field.name] is str:
            options |= {"metavar": "TEXT"}
        else:
            options |= {"action": _Pairs, "metavar": "NAME=VALUE"}
        found.add_argument(f"--{field.name}", **options)


class _Pairs(argparse.Action):
    """Collects NAME=VALUE of a flag that may be given several times."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        name, equals, value = str(values).partition("=")
        if not equals:
            raise UsageError(f"{option_string}={values} should be {option_string}=NAME=VALUE")
        setattr(namespace, self.dest, {**getattr(namespace, self.dest, {}), name: value})


def _usual(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            found[field.name] = _usual(typing.cast(type, hints[field.name]))
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            found[field.name] = field.default
    return found


def _merged(values: Mapping[str, Any], given: Mapping[Any, Any], path: str) -> dict[str, Any]:
    """`given` over `values`, and in their dicts alike. UsageError for a key or a dict that is none; bridge.build looks
    at all the rest."""
    merged = dict(values)
    for name, value in given.items():
        if not isinstance(name, str):
            raise UsageError(f"{path} has the key {name!r}, which should be the name of a field")
        if isinstance(merged.get(name), Mapping):
            if not isinstance(value, Mapping):
                raise UsageError(f"{path}.{name}={value!r} should be a section: a dict")
            value = _merged(merged[name], value, f"{path}.{name}")
        merged[name] = value
    return merged
