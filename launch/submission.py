"""What a target makes of a job, as values, and the one place where they are printed or carried out.

A target's pure function gives a Submission; tests look at that, and no tool is needed for it.
"""

import dataclasses
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from t5x_like.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Step:
    """One command of a tool, as its argument list; `document` is its standard input."""

    command: tuple[str, ...]
    document: str = ""


@dataclasses.dataclass(frozen=True)
class Submission:
    """about: lines for people; steps: what hands the job over, in order; afterwards: {what for: a command}."""

    about: tuple[str, ...]
    steps: tuple[Step, ...]
    afterwards: Mapping[str, tuple[str, ...]]


def submit(submission: Submission, *, dry_run: bool) -> int:
    """Prints all of it, and carries it out unless `dry_run`. UserError where a tool is missing or fails."""
    for line in submission.about:
        print(f"# {line}")
    for step in submission.steps:
        if step.document and dry_run:
            print(step.document.rstrip())
        print(f"$ {shlex.join(step.command)}{' < the document above' if step.document and dry_run else ''}", flush=True)
        if not dry_run:
            _run(step)
    for purpose, command in submission.afterwards.items():
        print(f"# {purpose}: {shlex.join(command)}")
    if dry_run:
        print("# --dry_run: nothing was submitted")
    return 0


def need(tools: Sequence[str]) -> None:
    """UserError that names the first tool that is not installed."""
    for tool in tools:
        if shutil.which(tool) is None:
            raise UserError(f"{tool} is not installed or not in PATH; install it, or look at --dry_run")


def _run(step: Step) -> None:
    need(step.command[:1])
    # In a session of its own: a Ctrl-C is for us, and a tool that it ended halfway may have submitted the job.
    done = subprocess.run(step.command, input=step.document or None, text=True, check=False, start_new_session=True)
    if done.returncode:
        raise UserError(f"{shlex.join(step.command)} ended with status {done.returncode}; nothing more was done")
