"""Runs on Cloud TPU VMs without a cluster: a queued resource, whose machines start the run at every boot.

    python -m launch.gcloud --config=configs/pretrain/llama3_8b.py --topology=v5p:4x4x4 --spot --zone=us-east5-a \\
        --image=REGION-docker.pkg.dev/PROJECT/REPOSITORY/t5x_like:TAG --workdir=gs://BUCKET/llama3_8b \\
        --config.data.source=jsonl:gs://BUCKET/text/*.jsonl --config.data.tokenizer=gs://BUCKET/tokenizer [--dry_run]

Every machine gets one startup script, which runs the container, starts it again after a preemption or a fault, and
deletes the TPUs when the run has ended (--keep: leaves them, and their price). With --follow this command stays, and
asks for new TPUs whenever spot capacity was taken away. Needs the gcloud command line.
"""

import functools
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from launch import container, flags
from launch.job import Job, check_container
from launch.submission import Step, Submission, need, submit
from t5x_like.core import accelerators
from t5x_like.core.errors import UsageError, UserError

_SECONDS = 60  # between two looks of --follow
_MOST_FAILURES = 60  # of gcloud in a row: an hour without network, say
# States of a queued resource from which it never comes back, and of a TPU VM.
_LOST = ("SUSPENDED", "PREEMPTED", "TERMINATED")
_FAILED = "FAILED"  # a request that expired or cannot be granted; the next one would not be either
_DELETING = "DELETING"
_GONE = "gone"

# Reads $keep and the array delete. All machines do this at about the same time; the first one deletes all.
_AFTERWARDS = """
until_it_ends
[ -n "$keep" ] && exit 0
sleep 120
metadata() {
  curl --silent --fail --header 'Metadata-Flavor: Google' "http://metadata.google.internal/computeMetadata/v1/$1"
}
# TPUs cost until they are deleted, so one failure of the network must not be the end of it.
until zone=$(metadata instance/zone) && project=$(metadata project/project-id) &&
  gcloud "${delete[@]}" --zone="${zone##*/}" --project="$project" --quiet; do
  echo 'launch: the TPUs are not deleted and cost on; tries again in 60 s'
  sleep 60
done
"""


def main(arguments: Sequence[str] | None = None) -> int:
    return flags.main(launch, arguments, target="gcloud", about=__doc__)


def launch(asked: flags.Asked) -> int:
    submission = plan(asked.job)
    if asked.dry_run or not asked.job.gcloud.follow:
        return flags.carry_out(asked, submission)
    flags.check_run(asked)
    follow(asked.job, submission, state_of, time.sleep)
    return 0


def plan(job: Job) -> Submission:
    """What is submitted. UsageError for what TPU VMs cannot do."""
    check(job)
    what = f"{job.slices} slices of {job.topology}" if job.slices > 1 else f"a slice of {job.topology}"
    about = [f"{job.name}: {what}, {job.slices * job.slice.chips} chips"]
    about.append(
        "deletes its TPUs when the run has ended" if not job.gcloud.keep else "its TPUs cost until you delete them"
    )
    if job.spot and not job.gcloud.follow:
        about.append("spot TPUs that are taken away stay away: --follow asks for new ones")
    if job.gcloud.follow:
        about.append("this command stays until the run has ended, and asks for new TPUs when they are taken away")
    return Submission(
        about=tuple(about),
        steps=(Step(create(job), startup_script(job)),),
        afterwards={
            "state": _with_place(job, *_resource(job), "describe", job.name),
            "all": _with_place(job, *_resource(job), "list"),
            "log": log(job),
            "stop": delete(job),
        },
    )


def check(job: Job) -> None:
    """UsageError, in one line, for what a TPU VM cannot do."""
    check_vm(job)
    if job.slices > 1 and not job.gcloud.queued:
        raise UsageError(f"--slices={job.slices} needs a queued resource; leave out --no-queued")
    if job.reservation and not job.gcloud.queued:
        raise UsageError(f"--reservation={job.reservation} needs a queued resource; leave out --no-queued")
    if not job.zone:
        raise UsageError("--zone is missing; give the zone of the TPUs, such as --zone=us-east5-a")
    if job.zone.count("-") == 1:
        raise UsageError(f"--zone={job.zone} should be a zone, not a region: {job.zone}-a")
    longest = len(job.name) + (len(f"-{job.slices - 1}") if job.slices > 1 else 0)
    if longest > 63:
        raise UsageError(f"--name={job.name} has {longest} characters with the number of a slice; the limit is 63")


def check_vm(job: Job) -> None:
    """UsageError unless a TPU VM can run the job's container."""
    if not job.slice.row.runtime:
        raise UsageError(
            f"--topology={job.topology}: {job.slice.generation} is on GKE alone; use launch.gke or launch.xpk"
        )
    check_container(job)


def create(job: Job) -> tuple[str, ...]:
    """The command that asks for the TPUs; its standard input is the startup script."""
    version = "runtime-version" if job.gcloud.queued else "version"
    words = [*_resource(job), "create", job.name, *_slice(job)]
    words.append(f"--{version}={job.gcloud.runtime or job.slice.row.runtime}")
    if job.gcloud.queued:
        one = [f"--node-id={job.name}"]
        words += one if job.slices == 1 else [f"--node-count={job.slices}", f"--node-prefix={job.name}"]
    if job.spot:
        words.append("--spot")
    if job.reservation:
        words += ["--reserved", f"--reservation={job.reservation}"]
    if job.gcloud.valid_until:
        words.append(f"--valid-until-duration={job.gcloud.valid_until}")
    for name in ("network", "subnetwork", "service_account"):
        if getattr(job.gcloud, name):
            words.append(f"--{name.replace('_', '-')}={getattr(job.gcloud, name)}")
    words.append("--scopes=https://www.googleapis.com/auth/cloud-platform")
    words.append("--metadata-from-file=startup-script=/dev/stdin")
    return _with_place(job, *words)


def delete(job: Job) -> tuple[str, ...]:
    """The command that ends the run and its price, whatever its state."""
    return _with_place(job, *_resource(job), "delete", job.name, *(["--force"] if job.gcloud.queued else []), "--quiet")


def log(job: Job) -> tuple[str, ...]:
    """The command that shows what process 0 says."""
    machine = f"{job.name}-0" if job.slices > 1 else job.name
    show = f"tail -n 100 -F {log_file(job)}"
    return _with_place(job, "gcloud", "compute", "tpus", "tpu-vm", "ssh", machine, "--worker=0", f"--command={show}")


def log_file(job: Job, folder: str = "/var/log") -> str:
    return f"{folder}/t5x_like-{job.name}.log"


def startup_script(job: Job, *, folder: str = "/var/log") -> str:
    """What every machine runs as root at each boot. folder: of its log."""
    kind = ("compute", "tpus", "queued-resources" if job.gcloud.queued else "tpu-vm", "delete", job.name)
    lines = [
        "#!/bin/bash",
        f"exec >> {shlex.quote(log_file(job, folder))} 2>&1",
        f"keep={'yes' if job.gcloud.keep else ''}",
        f"delete=({shlex.join((*kind, '--force') if job.gcloud.queued else kind)})",
    ]
    return "\n".join(lines) + "\n" + container.until_it_ends(job) + _AFTERWARDS


def follow(job: Job, submission: Submission, state: Callable[[Job], str], wait: Callable[[float], None]) -> None:
    """Asks for TPUs, unless they are there already, and anew whenever they were taken away, until the run has deleted
    them. What gcloud cannot do once it is asked for again; UserError where it could not for an hour, where the request
    has failed, or where the first answer is an error.

    state: the state of the job's TPUs; wait: for so many seconds.
    """
    last, failures, wanted = "", 0, True  # wanted: what is gone is asked for, and not the end of the run
    while True:
        try:
            found = state(job)
            if found != last:
                print(f"# {time.strftime('%F %T')} {job.name} is {found}", flush=True)
            if found == _GONE and not wanted:
                print(f"# {job.name} has ended: its TPUs are deleted")
                return
            if found == _GONE:
                submit(submission, dry_run=False)
                found, wanted = "asked for", False
            elif found in _LOST:
                wanted = True
                submit(Submission((), (Step(delete(job)),), {}), dry_run=False)
            elif found != _DELETING:
                wanted = False
            last, failures = found, 0
        except UserError as error:
            failures += 1
            if not last or failures == _MOST_FAILURES:
                raise
            print(f"# {error}; tries again in {_SECONDS} s", flush=True)
        if last == _FAILED:
            raise UserError(
                f"{job.name} is {_FAILED}, and a new request would be too: {shlex.join(submission.afterwards['state'])}"
                f" says why, and {shlex.join(delete(job))} makes room for another"
            )
        wait(_SECONDS)


def state_of(job: Job) -> str:
    """The state of a queued resource or a TPU VM as gcloud says it, "gone" where there is none."""
    field = "state.state" if job.gcloud.queued else "state"
    command = _with_place(job, *_resource(job), "describe", job.name, f"--format=value({field})")
    need(command[:1])
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return done.stdout.strip()
    if "NOT_FOUND" in done.stderr or "was not found" in done.stderr:
        return _GONE
    raise UserError(f"{shlex.join(command)}: {' '.join(done.stderr.split())}; {job.name} itself goes on")


@functools.cache
def several_shapes(found: accelerators.Slice) -> bool:
    """Whether another slice has the same accelerator type, by which gcloud and SkyPilot ask: v5p-512."""
    return any(each.name == found.name and each != found for each in accelerators.slices(found.generation))


def _slice(job: Job) -> list[str]:
    """The accelerator type, or type and topology where it has several shapes, which gcloud knows as alpha."""
    if several_shapes(job.slice):
        return [f"--type={job.slice.row.prefix}", f"--topology={job.slice.shape}"]
    return [f"--accelerator-type={job.slice.name}"]


def _resource(job: Job) -> tuple[str, ...]:
    # Reservations by name and shapes of newer generations are alpha in gcloud 528.
    alpha = ("alpha",) if job.reservation or several_shapes(job.slice) else ()
    return ("gcloud", *alpha, "compute", "tpus", "queued-resources" if job.gcloud.queued else "tpu-vm")


def _with_place(job: Job, *words: str) -> tuple[str, ...]:
    places = {"zone": job.zone, "project": job.project}
    return (*words, *(f"--{name}={value}" for name, value in places.items() if value))


if __name__ == "__main__":
    sys.exit(main())
