"""A run through xpk, Google's tool for TPU clusters: the command line of `xpk workload create`, and its commands after.

    python -m launch.xpk --config=configs/pretrain/llama3_8b.py --topology=v5p:4x4x4 --slices=2 --cluster=CLUSTER \\
        --image=REGION-docker.pkg.dev/PROJECT/REPOSITORY/t5x_like:TAG --workdir=gs://BUCKET/llama3_8b \\
        --config.data.source=jsonl:gs://BUCKET/text/*.jsonl --config.data.tokenizer=gs://BUCKET/tokenizer \\
        --project=PROJECT --zone=ZONE --config.mesh.slice=2 [--dry_run]

For clusters that xpk made. It counts every restart, those after preemptions too, so give --max_restarts with room for
them. launch/gke.py does not count those, and needs no xpk.
"""

import shlex
import sys
from collections.abc import Sequence

from launch import flags, validate
from launch.gke import check as check_pods
from launch.gke import literal, manifest
from launch.job import PREEMPTED, Job
from launch.submission import Step, Submission
from t5x_like.core.errors import UsageError

PRIORITIES = ("very-low", "low", "medium", "high", "very-high")
_FAULT = 1
_LONGEST_NAME = 40  # xpk's own limit
_ONLY_GKE = ("queue", "service_account", "placement_policy")


def main(arguments: Sequence[str] | None = None) -> int:
    return flags.main(launch, arguments, target="xpk", about=__doc__)


def launch(asked: flags.Asked) -> int:
    check(asked.job)
    validate.require(manifest(asked.job))  # xpk names jobs and pods in the same way
    return flags.carry_out(asked, submission(asked.job))


def check(job: Job) -> None:
    """UsageError, in one line, for what xpk cannot do."""
    check_pods(job)
    if not job.gke.cluster:
        raise UsageError("--cluster is missing; give the cluster that `xpk cluster create` made")
    if len(job.name) > _LONGEST_NAME:
        raise UsageError(f"--name={job.name} has {len(job.name)} characters, and xpk takes at most {_LONGEST_NAME}")
    if job.gke.priority and job.gke.priority not in PRIORITIES:
        raise UsageError(f"--priority={job.gke.priority} is none of xpk's: {', '.join(PRIORITIES)}")
    for name in _ONLY_GKE:
        if getattr(job.gke, name):
            raise UsageError(f"--{name}={getattr(job.gke, name)}: xpk chooses it; leave it out, or use launch.gke")
    # xpk writes both as they are into YAML: values between double quotes, the command as one line of a shell script.
    for name, value in job.environment.items():
        if '"' in value or "\\" in value or not value.isprintable():
            raise UsageError(
                f"--environment={name}={value!r}: xpk takes no value with quotation marks, backslashes or line breaks; "
                "use launch.gke"
            )
    for argument in job.arguments:
        if not argument.isprintable():
            raise UsageError(f"{argument!r}: xpk takes no argument with a line break; use launch.gke")


def create(job: Job) -> tuple[str, ...]:
    """The argument list of `xpk workload create`."""
    slice_ = job.slice
    command = [
        *("xpk", "workload", "create"),
        f"--workload={job.name}",
        f"--cluster={job.gke.cluster}",
        f"--project={job.project}",
        f"--zone={job.zone}",
        f"--namespace={job.gke.namespace}",
        f"--tpu-type={slice_.row.prefix}-{slice_.shape}",  # the name alone, v5p-512, may mean several shapes
        f"--num-slices={job.slices}",
        f"--docker-image={job.image}",
        f"--max-restarts={job.max_restarts}",
        # Of its own accord xpk restarts 42 and 127 to 255 alone: a run that was preempted and saved would be ended.
        f"--restart-on-exit-codes={_FAULT},{PREEMPTED}",
        f"--ttl-seconds-after-finished={job.gke.keep_seconds}",
        f"--termination-grace-period-seconds={job.grace_seconds}",
    ]
    if job.gke.priority:
        command.append(f"--priority={job.gke.priority}")
    if job.spot:
        command.append("--spot")
    if job.reservation:
        command.append(f"--reservation={job.reservation}")
    command += [f"--env={name}={literal(value)}" for name, value in environment(job).items()]
    # xpk runs this in a shell: exec leaves none of it between SIGTERM and the run.
    return (*command, f"--command=exec {literal(shlex.join(['python', *job.arguments]))}")


def environment(job: Job) -> dict[str, str]:
    """Of every process; what tells slices of each other the cluster sets."""
    return {"PYTHONUNBUFFERED": "1", **job.environment}


def submission(job: Job) -> Submission:
    where = (f"--cluster={job.gke.cluster}", f"--project={job.project}", f"--zone={job.zone}")
    about = f"xpk workload {job.name}: {job.slices} x {job.slice.spelled}, {job.slices * job.slice.chips} chips in all"
    return Submission(
        about=(about,),
        steps=(Step(create(job)),),
        afterwards={
            "state": ("xpk", "workload", "list", *where, f"--filter-by-job={job.name}"),
            "watch the first process": (
                *("kubectl", "logs", "--follow"),
                f"--selector=jobset.sigs.k8s.io/jobset-name={job.name},jobset.sigs.k8s.io/job-index=0,"
                "batch.kubernetes.io/job-completion-index=0",
            ),
            "stop and delete; all save": ("xpk", "workload", "delete", f"--workload={job.name}", *where),
        },
    )


if __name__ == "__main__":
    sys.exit(main())
