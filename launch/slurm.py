"""Hands a run to a Slurm cluster: a batch script with one srun step, which starts it again where it was.

    python -m launch.slurm --config=configs/pretrain/llama3_8b.py --workdir=runs/8b --nodes=4 --gpus_per_node=8 \\
        --config.data.source=jsonl:/data/text/*.jsonl --config.data.tokenizer=/data/tokenizer --time=24:00:00 \\
        [--config.optim.learning_rate=1e-4] [--dry_run]

Slurm warns the run by SIGUSR1 before its time limit and by SIGTERM before it takes the nodes; the run saves and ends
with 75, and is requeued. All nodes must see the checkout, the interpreter and the workdir at the same paths.
"""

import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence

from launch import flags
from launch.job import PREEMPTED, WRONG_USE, Job
from launch.submission import Step, Submission
from t5x_like.core.errors import UsageError

# Slurm looks at time limits once a minute, and may warn that much earlier.
_EARLIER = 60

# Options of sbatch that a job has already, and what to do instead.
_OF_WHOLE_NODES = ("--exclusive", "--mem")
_SET_HERE = {
    **{name: "add --no-whole_nodes" for name in _OF_WHOLE_NODES},
    **{name: "give it beside this one" for name in ("--nodes", "--time", "--partition", "--account", "--reservation")},
    **{name: "leave it out" for name in ("--output", "--error", "--open-mode", "--chdir", "--array", "--wrap")},
    **{name: "a run starts again by it" for name in ("--requeue", "--no-requeue")},
    "--job-name": "use --name",
    "--ntasks": "use --nodes and --processes_per_node",
    "--ntasks-per-node": "use --processes_per_node",
    "--gpus-per-node": "use --gpus_per_node",
    "--gpus-per-task": "use --gpus_per_node",
    "--gpus": "use --nodes and --gpus_per_node",
    "--comment": "faults are counted there",
    "--signal": "use --grace_seconds",
}

# Reads $status of the run, $stopped of the shell and $max_restarts. `scontrol requeue` ends the script.
_AFTERWARDS = f"""
again() {{
  echo "launch: status $status, $1; starts again"
  scontrol requeue "$SLURM_JOB_ID"
}}

# The number of faults is kept by Slurm, in the comment of the job, since a script starts anew each time.
faults=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%k)
faults=${{faults#faults=}}
case $faults in '' | *[!0-9]*) faults=0 ;; esac
if [ "$status" -eq 0 ]; then
  echo 'launch: done'
elif [ -n "$stopped" ]; then
  echo "launch: status $status, stopped by Slurm, which says what follows"
elif [ "$status" -eq {PREEMPTED} ]; then
  again 'saved'
elif [ "$status" -eq {WRONG_USE} ]; then
  echo "launch: status $status, wrong use, which no restart helps"
elif [ "$faults" -lt "$max_restarts" ]; then
  scontrol update JobId="$SLURM_JOB_ID" Comment="faults=$((faults + 1))"
  again "fault $((faults + 1)), of which $max_restarts are followed by a restart"
else
  echo "launch: status $status, fault $((faults + 1)); no restart is left of $max_restarts"
fi
exit "$status"
"""


def main(arguments: Sequence[str] | None = None) -> int:
    return flags.main(launch, arguments, target="slurm", about=__doc__)


def launch(asked: flags.Asked) -> int:
    # A config file may name TPUs for other targets; here it is looked at on the GPUs or processes of the nodes.
    job = dataclasses.replace(asked.job, topology="", slices=1)
    found = plan(asked.job, python=sys.executable, folder=os.getcwd())
    return flags.carry_out(dataclasses.replace(asked, job=job), found)


def plan(job: Job, *, python: str, folder: str) -> Submission:
    """What is submitted. python: the interpreter where the job names none; folder: where the run starts.

    UsageError for what Slurm cannot give.
    """
    _check(job)
    log = log_of(job, folder)
    processes = job.slurm.nodes * job.slurm.processes_per_node
    ignored = [name for name in ("topology", "image", "spot", "project", "zone") if getattr(job, name)]
    about = [
        f"{job.name}: {processes} processes on {job.slurm.nodes} nodes"
        + (f" with {job.slurm.gpus_per_node} GPUs each" if job.slurm.gpus_per_node else ""),
        f"output goes to {log}",
    ]
    if ignored:
        about.append(f"not used by Slurm: {', '.join(ignored)}")
    return Submission(
        about=tuple(about),
        steps=(
            Step(("mkdir", "-p", os.path.dirname(log))),
            Step(("sbatch",), script(job, python=python, folder=folder)),
        ),
        afterwards={
            "watch": ("tail", "-F", log),
            "state": ("squeue", "--me", f"--name={job.name}"),
            "stop (saves first)": ("scancel", f"--name={job.name}"),
        },
    )


def script(job: Job, *, python: str, folder: str) -> str:
    """The batch script."""
    lines = ["#!/bin/bash", *(f"#SBATCH {_quoted(option)}" for option in batch_options(job, folder))]
    lines += ["", "export PYTHONUNBUFFERED=1"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in job.environment.items()]
    lines += job.slurm.setup.splitlines()
    lines += [
        "",
        "# By scancel, scontrol requeue or preemption; the run is told by Slurm itself.",
        "stopped=",
        "trap 'stopped=1' TERM",
        f"max_restarts={job.max_restarts}",
        'echo "launch: start $((${SLURM_RESTART_COUNT:-0} + 1)) of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST"',
        shlex.join(("srun", *step_options(job), job.slurm.python or python, *job.arguments)),
        "status=$?",
    ]
    return "\n".join(lines) + "\n" + _AFTERWARDS


def batch_options(job: Job, folder: str) -> list[str]:
    """The options of sbatch."""
    slurm = job.slurm
    found = [
        f"--job-name={job.name}",
        "--dependency=singleton",  # a second job of this name would write to the same workdir: it waits for the first
        f"--nodes={slurm.nodes}",
        f"--ntasks-per-node={slurm.processes_per_node}",
    ]
    if slurm.gpus_per_node:
        # Not --gpus-per-task, which hides the GPUs of a node from each other.
        found.append(f"--gpus-per-node={slurm.gpus_per_node}")
    if slurm.whole_nodes:
        found += ["--exclusive", "--mem=0"]
    for name in ("time", "partition", "account"):
        if getattr(slurm, name):
            found.append(f"--{name}={getattr(slurm, name)}")
    if job.reservation:
        found.append(f"--reservation={job.reservation}")
    found += [
        "--requeue",
        f"--signal=USR1@{job.grace_seconds}",  # to the processes, not to the shell
        "--open-mode=append",
        f"--output={log_of(job, folder).replace('%', '%%')}",
        f"--chdir={folder}",
    ]
    return found + shlex.split(slurm.batch_options)


def step_options(job: Job) -> list[str]:
    """The options of srun, for one step with all processes.

    The processes of a run end each other when one fails, with a line that says why; Slurm would do it at the first
    status that is not 0, and a process that has saved must not end one that still does.
    """
    found = ["--label", "--kill-on-bad-exit=0", f"--wait={job.grace_seconds}"]
    # Else a process may be kept on one core; what is shared with other jobs is left to options.
    found += ["--cpu-bind=none"] if job.slurm.whole_nodes else []
    return found + shlex.split(job.slurm.step_options)


def log_of(job: Job, folder: str) -> str:
    """The file that all starts append to: beside the workdir, or in `folder` if that is in a bucket."""
    if "://" in job.workdir:
        return os.path.join(folder, f"{job.name}.log")
    return os.path.join(folder, job.workdir).rstrip("/") + ".log"


def _check(job: Job) -> None:
    for option in shlex.split(job.slurm.batch_options):
        name = option.partition("=")[0]
        allowed = not job.slurm.whole_nodes and name in _OF_WHOLE_NODES
        if name in _SET_HERE and not allowed:
            raise UsageError(f"--batch_options={option}: the launcher sets {name} itself; {_SET_HERE[name]}")
    limit = job.slurm.seconds
    if job.slurm.time and limit is not None and limit < job.grace_seconds + 2 * _EARLIER:
        raise UsageError(
            f"--time={job.slurm.time} leaves no time to train: the run is asked to save {job.grace_seconds} s "
            f"(--grace_seconds), and up to {_EARLIER} s more, before its limit; give a longer one"
        )


def _quoted(option: str) -> str:
    if "\\" in option or "\n" in option:
        raise UsageError(f"{option!r}: Slurm takes no option with a backslash or a line break; rename it")
    return shlex.quote(option)


if __name__ == "__main__":
    sys.exit(main())
