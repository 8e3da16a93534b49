"""A run as a managed job of SkyPilot, which looks for spot TPUs in all zones and gets new ones after a preemption.

    python -m launch.sky --config=configs/pretrain/llama3_8b.py --topology=v6e:4x4 --spot [--zone=us-east5] \\
        --image=REGION-docker.pkg.dev/PROJECT/REPOSITORY/t5x_like:TAG --workdir=gs://BUCKET/llama3_8b \\
        --config.data.source=jsonl:gs://BUCKET/text/*.jsonl --config.data.tokenizer=gs://BUCKET/tokenizer [--dry_run]

Every machine of the slice runs the container, and starts it again after a fault. Needs the command `sky`, best in an
environment of its own (`pipx install "skypilot[gcp]"`), since SkyPilot wants older packages than this project has.
"""

import sys
from collections.abc import Sequence
from typing import Any

import yaml

from launch import container, flags
from launch.gcloud import check_vm, several_shapes
from launch.job import Job
from launch.submission import Step, Submission
from launch.validate import sky_task
from t5x_like.core.errors import UsageError


def main(arguments: Sequence[str] | None = None) -> int:
    return flags.main(launch, arguments, target="sky", about=__doc__)


def launch(asked: flags.Asked) -> int:
    check(asked.job)
    document = task(asked.job)
    notes = sky_task.require(document)
    return flags.carry_out(asked, submission(asked.job, document, notes))


def check(job: Job) -> None:
    """UsageError, in one line, for what SkyPilot cannot do."""
    check_vm(job)
    if job.slices > 1:
        raise UsageError(
            f"--slices={job.slices}: SkyPilot connects no slices; use launch.gke, launch.xpk or launch.gcloud"
        )
    if several_shapes(job.slice):
        raise UsageError(
            f"--topology={job.topology}: SkyPilot knows it as {job.slice.name}, which has other shapes too; "
            "use launch.gke, launch.xpk or launch.gcloud"
        )
    if job.reservation:
        raise UsageError(f"--reservation={job.reservation}: SkyPilot takes it from ~/.sky/config.yaml; leave it out")


def task(job: Job) -> dict[str, Any]:
    """The task. What it costs to be preempted is SkyPilot's to mend, all else the shell's on the machines."""
    recovery = {
        "strategy": "FAILOVER" if job.zone else "EAGER_NEXT_REGION",
        # Faults are counted, and 75 is started again, where they happen: a restart here is new machines.
        "max_restarts_on_errors": 0,
    }
    resources = {
        "infra": infra(job),
        "accelerators": f"tpu-{job.slice.name}",
        # SkyPilot's own choice for v5e is that of v5p.
        "accelerator_args": {"runtime_version": job.slice.row.runtime},
        "use_spot": job.spot,
        "job_recovery": recovery,
    }
    run = container.until_it_ends(job, as_root=("sudo",)) + "until_it_ends\nexit $?\n"
    return {"name": job.name, "resources": resources, "run": run}


def infra(job: Job) -> str:
    """SkyPilot's name of a place: gcp/us-east5/us-east5-a for a zone, gcp/us-east5 for a region."""
    if job.zone.count("-") == 2:
        return f"gcp/{job.zone.rpartition('-')[0]}/{job.zone}"
    return f"gcp/{job.zone}" if job.zone else "gcp"


def submission(job: Job, document: dict[str, Any], notes: Sequence[str] = ()) -> Submission:
    path = f"runs/{job.name}.sky.yaml"
    about = [f"{job.name}: a slice of {job.topology}, {job.slice.chips} chips, wherever SkyPilot finds them", *notes]
    if job.project:
        about.append(f"--project={job.project} is not used: SkyPilot takes gcloud's")
    return Submission(
        about=tuple(about),
        steps=(
            Step(("mkdir", "-p", "runs")),
            # From the standard input, as sky reads files alone.
            Step(("cp", "/dev/stdin", path), yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=1000)),
            Step(("sky", "jobs", "launch", "--yes", "--detach-run", path)),
        ),
        afterwards={
            "state": ("sky", "jobs", "queue"),
            "log": ("sky", "jobs", "logs", f"--name={job.name}"),
            "stop": ("sky", "jobs", "cancel", f"--name={job.name}", "--yes"),
        },
    )


class _Dumper(yaml.SafeDumper):
    """Shows shell text line by line."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


if __name__ == "__main__":
    sys.exit(main())
