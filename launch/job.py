"""One description of a run for every place that can run it: `Job` says what runs, on which chips, and what it may cost.

A config file may define `get_launch() -> dict` beside `get_config()`; flags come on top (flags.py). That is about where
a run runs, never about what it computes: nothing of it is stored in a workdir. Each target is a file beside this one,
which turns a Job into documents and commands.

Exit statuses of a run, on which every target acts: 0 done; 75 preempted and saved: start again, which `max_restarts`
does not count; 2 wrong use, which no restart helps; anything else is a fault, and one of `max_restarts` restarts.
"""

import dataclasses
import os
import re
import shlex
from typing import Any

from t5x_like.core import accelerators
from t5x_like.core.errors import UsageError, UserError
from t5x_like.storage import paths

PREEMPTED = 75
WRONG_USE = 2

# What tells the processes of a run about each other is ours, or the cluster's, to set.
_OURS = re.compile(r"JAX_(COORDINATOR_ADDRESS|PROCESS_ID|NUM_PROCESSES)|MEGASCALE_.*|TPU_(WORKER|PROCESS|SKIP)_.*")
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # DNS-1035: what Kubernetes makes host names of
_LONGEST_NAME = 63
_MOST = 2**31 - 1  # what Kubernetes and Slurm count up to
_MOST_SLICES = 1024
_ZONE = re.compile(r"[a-z]+-[a-z]+[0-9]+(-[a-z][a-z0-9]*)?")
_HOST = r"(?:[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+(?::[0-9]+)?|[A-Za-z0-9-]+:[0-9]+|localhost)"
_PART = r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"(?:{_HOST}/)?{_PART}(?:/{_PART})*", re.ASCII)
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_RESERVATION = re.compile(r"(projects/[a-z][-a-z0-9:.]*/reservations/)?[a-z]([-a-z0-9]*[a-z0-9])?")
_LINES = ("setup",)  # fields of several lines
_NOT_IN_IMAGES = ("runs", "tests", "build", ".venv", ".git")  # folders that .dockerignore leaves out
_BUCKET = re.compile(r"gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/[^/]+)+/?")


def option(default: Any, text: str) -> Any:
    """A field with its usual value and what --help says of it."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Gke:
    """What a JobSet on Google Kubernetes Engine needs besides; xpk reads it too."""

    cluster: str = option("", "name of the GKE cluster; '': the one kubectl speaks to")
    namespace: str = option("default", "namespace of the cluster")
    queue: str = option("", "Kueue's local queue, such as multislice-queue; '': none")
    priority: str = option("", "priority class of the pods, such as medium; '': the cluster's")
    service_account: str = option("", "Kubernetes service account with access to the bucket; '': the nodes' own")
    placement_policy: str = option("", "placement policy of the node pools, which slices of tpu7x need; '': none")
    keep_seconds: int = option(43200, "how long a finished JobSet and its logs stay")

    def check(self, _path: str) -> None:
        for name in ("namespace", "queue", "priority", "service_account", "cluster", "placement_policy"):
            value = getattr(self, name)
            if value and not (_NAME.fullmatch(value) and len(value) <= _LONGEST_NAME):
                raise UsageError(
                    f"--{name}={value} should be of a-z, 0-9 and -, begin with a letter and end with none of -, in at "
                    f"most {_LONGEST_NAME} characters"
                )
        _check_count("keep_seconds", self.keep_seconds, least=0)


@dataclasses.dataclass(frozen=True)
class Slurm:
    """What a batch script of Slurm needs besides."""

    nodes: int = option(1, "how many nodes")
    processes_per_node: int = option(1, "1: one process has all GPUs of its node; else they share them equally")
    gpus_per_node: int = option(0, "GPUs of each node; 0: none")
    time: str = option("", "limit of one start, such as 4:00:00 or 2-00:00:00; '': the partition's")
    partition: str = option("", "partition; '': the cluster's")
    account: str = option("", "account that pays; '': the user's")
    whole_nodes: bool = option(True, "all processors and memory of the nodes, shared with no other job")
    python: str = option("", "interpreter on the nodes; '': the one that submits")
    setup: str = option("", "shell commands before the run, such as 'module load cuda'")
    batch_options: str = option("", "more options of sbatch, as one text: '--qos=high --constraint=h100'")
    step_options: str = option("", "more options of srun, as one text: '--container-image=IMAGE' (pyxis)")

    def check(self, _path: str) -> None:
        for name, least in (("nodes", 1), ("processes_per_node", 1), ("gpus_per_node", 0)):
            _check_count(name, getattr(self, name), least=least)
        if self.gpus_per_node % self.processes_per_node:
            raise UsageError(
                f"--gpus_per_node={self.gpus_per_node} cannot be shared by --processes_per_node="
                f"{self.processes_per_node}; give 1, or a divisor of the GPUs"
            )
        if self.time and self.seconds is None:
            raise UsageError(f"--time={self.time} should be like 4:00:00, 2-00:00:00, or 90 for minutes")
        for name in ("batch_options", "step_options"):
            _check_options(name, getattr(self, name))
        _check_lines(self)

    @property
    def seconds(self) -> int | None:
        """The limit of one start; None where `time` is none."""
        match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", self.time)
        if not match:
            return None
        days, first, second, third = (int(part or 0) for part in match.groups())
        if match[1]:
            return ((days * 24 + first) * 60 + second) * 60 + third
        if match[4]:
            return (first * 60 + second) * 60 + third
        return first * 60 + second


@dataclasses.dataclass(frozen=True)
class Gcloud:
    """What TPU VMs need besides."""

    queued: bool = option(True, "ask by a queued resource, which waits for capacity; --no-queued: a TPU VM at once")
    follow: bool = option(False, "stay, and ask for new TPUs whenever spot capacity was taken away")
    keep: bool = option(False, "leave the TPUs when the run has ended; they cost until you delete them")
    runtime: str = option("", "software version of the machines; '': that of the generation")
    valid_until: str = option("", "how long the request may wait, such as 6h; '': for ever")
    network: str = option("", "network; '': default")
    subnetwork: str = option("", "subnetwork; '': that of the network")
    service_account: str = option("", "e-mail of the service account; '': Compute Engine's default")

    def check(self, _path: str) -> None:
        if self.valid_until and not re.fullmatch(r"([1-9][0-9]{0,8}[smhd])+", self.valid_until):
            raise UsageError(f"--valid_until={self.valid_until} should be like 90m, 6h or 2d")
        if self.valid_until and not self.queued:
            raise UsageError(f"--valid_until={self.valid_until} needs a queued resource; leave out --no-queued")
        if self.keep and self.follow:
            raise UsageError("--keep and --follow exclude each other: TPUs that are gone tell that the run has ended")
        if self.service_account and not re.fullmatch(r"[^@\s]+@[^@\s]+\.[a-z]+", self.service_account):
            raise UsageError(f"--service_account={self.service_account} should be the e-mail of a service account")
        _check_lines(self)


def _check_count(name: str, value: int, *, least: int, most: int = _MOST) -> None:
    if value < least:
        raise UsageError(f"--{name}={value} should " + (f"be at least {least}" if least else "not be negative"))
    if value > most:
        raise UsageError(f"--{name}={value} should be at most {most}")


def _check_lines(section: Any) -> None:
    """No text of one line has several: scripts and commands are made of them, and errors are one line."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if isinstance(value, str) and not value.isprintable() and field.name not in _LINES:
            raise UsageError(f"--{field.name}={value!r} has characters that cannot be printed; leave them out")


def _check_options(name: str, text: str) -> None:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"--{name}={text!r}: {str(error).lower()}; give options as for a shell") from None
    for word in words:
        if not re.match(r"--[a-z]", word):
            raise UsageError(f"--{name}={text!r}: {word!r} should begin with --, its value behind =: --qos=high")


@dataclasses.dataclass(frozen=True)
class Job:
    """A run and where it runs. A section holds what one target alone needs. Bad values are UsageErrors, one line each.

    config: the --config... arguments, which the run gets unchanged
    """

    command: str
    config: tuple[str, ...]
    workdir: str = option("", "folder of the run; on clusters of Google gs://BUCKET/FOLDER")
    name: str = option("", "name of the job; '': the last part of the workdir")
    topology: str = option("", "TPU slice, such as v5p:4x4x4, v6e:4x8, v5e:4x4")
    slices: int = option(1, "how many of them")
    spot: bool = option(False, "spot capacity: cheaper, and taken away at any time")
    reservation: str = option("", "name of a reservation, or projects/PROJECT/reservations/NAME")
    image: str = option("", "container image with a tag or digest (launch/docker says how to build one)")
    project: str = option("", "Google Cloud project; '': gcloud's")
    zone: str = option("", "zone or region, such as us-east5-a; '': gcloud's")
    environment: dict[str, str] = dataclasses.field(
        default_factory=dict, metadata={"help": "NAME=VALUE for the processes; may be given several times"}
    )
    max_restarts: int = option(10, "restarts after faults; preemptions are not counted")
    grace_seconds: int = option(120, "time to save and end when asked to stop")
    gke: Gke = Gke()
    slurm: Slurm = Slurm()
    gcloud: Gcloud = Gcloud()

    def check(self, _path: str) -> None:
        _check_lines(self)
        if not self.workdir:
            raise UsageError("--workdir is missing; give the folder of the run")
        if not self.name:
            raise UsageError(f"--workdir={self.workdir} gives no name for the job; give --name")
        if not _NAME.fullmatch(self.name) or len(self.name) > _LONGEST_NAME:
            raise UsageError(
                f"--name={self.name} should be of a-z, 0-9 and -, begin with a letter and end with none of -, in at "
                f"most {_LONGEST_NAME} characters"
            )
        if self.topology:
            accelerators.parse(self.topology)
        _check_count("slices", self.slices, least=1, most=_MOST_SLICES)
        if self.slices > 1 and not self.topology:
            raise UsageError(f"--slices={self.slices} needs --topology, such as v5p:4x4x4")
        if self.spot and self.reservation:
            raise UsageError(f"--spot and --reservation={self.reservation} exclude each other; give one of them")
        if self.image:
            check_image(self.image)
        if self.zone and not _ZONE.fullmatch(self.zone):
            raise UsageError(f"--zone={self.zone} should be a zone such as us-east5-a, or a region such as us-east5")
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise UsageError(f"--environment={name}=... is no name of a variable; use letters, digits and _")
            if _OURS.fullmatch(name):
                raise UsageError(f"--environment={name}=... is set by the launcher; leave it out")
        _check_count("max_restarts", self.max_restarts, least=0)
        _check_count("grace_seconds", self.grace_seconds, least=1)

    @property
    def arguments(self) -> tuple[str, ...]:
        """Of the interpreter, in every process and at every start: a restart finds its checkpoint in the workdir."""
        return ("-m", "t5x_like", self.command, *self.config, f"--workdir={self.workdir}")

    @property
    def slice(self) -> accelerators.Slice:
        """The TPU slice; each of `slices` is one. UsageError where the job names none."""
        if not self.topology:
            raise UsageError("--topology is missing; give the TPU slice, such as --topology=v5p:4x4x4")
        return accelerators.parse(self.topology)


def check_container(job: Job) -> None:
    """UsageError unless a container on a machine of Google can run the job, and every later one finds its workdir."""
    if not job.image:
        raise UsageError("--image is missing; give the container image with its tag (launch/docker builds one)")
    check_image(job.image)
    check_bucket(job)
    check_in_image(job)
    check_reservation(job)


def check_image(image: str) -> None:
    """UsageError unless the image is one for good: a restart must not find another program.

    [HOST/]NAME:TAG, [HOST/]NAME@sha256:DIGEST or both, by the grammar of container registries.
    """
    named, at, digest = image.partition("@")
    folders, slash, last = named.rpartition("/")
    last, colon, tag = last.partition(":")
    if not at and not tag:
        raise UsageError(f"--image={image} has no tag; give IMAGE:TAG, so that every restart runs the same program")
    if not at and tag == "latest":
        raise UsageError(f"--image={image}: what `latest` means changes between restarts; give a tag of your own")
    if colon and not _TAG.fullmatch(tag):
        raise UsageError(f"--image={image}: {tag!r} is no tag; use letters, digits and _.-")
    if at and not _DIGEST.fullmatch(digest):
        raise UsageError(f"--image={image}: {digest!r} is no digest; give sha256: and its 64 characters of 0-9 and a-f")
    if not _REPOSITORY.fullmatch(folders + slash + last):
        raise UsageError(
            f"--image={image}: {folders + slash + last!r} names no image; give [HOST/]NAME:TAG, NAME of a-z, 0-9, ._- "
            "and /"
        )


def check_reservation(job: Job) -> None:
    """UsageError unless a reservation is named as Google Cloud names them."""
    if job.reservation and not _RESERVATION.fullmatch(job.reservation):
        raise UsageError(
            f"--reservation={job.reservation} should be NAME or projects/PROJECT/reservations/NAME, NAME of a-z, 0-9 "
            "and -"
        )


def check_bucket(job: Job) -> None:
    """UsageError unless the workdir is in a bucket, where every host and every later start finds it."""
    if not job.workdir.startswith("gs://"):
        raise UsageError(
            f"--workdir={job.workdir} is a path of one machine, and the hosts of this job share no disk; "
            "give gs://BUCKET/FOLDER"
        )
    if not _BUCKET.fullmatch(job.workdir):
        raise UsageError(
            f"--workdir={job.workdir} names no folder of a bucket; give gs://BUCKET/FOLDER, BUCKET with at least 3 "
            "characters of a-z, 0-9 and ._-"
        )


def check_writable(job: Job) -> None:
    """UserError unless an object can be written to the workdir in a bucket, by whoever asks: better said now than by
    every host, after its machine was waited for."""
    probe = paths.join(job.workdir, f".writable-{job.name}")
    try:
        paths.write_bytes_atomic(probe, b"")
        paths.remove_tree(probe)
    except UserError as error:
        raise UserError(f"--workdir={job.workdir} cannot be written: {error} (--no_check does not try)") from None


def check_in_image(job: Job) -> None:
    """UsageError where the config file is not in an image, which is the checkout without what .dockerignore names."""
    for argument in job.config:
        path = argument.removeprefix("--config=").partition(":")[0]
        if not argument.startswith("--config="):
            continue
        normal = os.path.normpath(path)
        first, inside, _ = normal.partition("/")
        if os.path.isabs(path) or path.startswith("~") or first == "..":
            reason = "is outside of the checkout, and so not in the image"
        elif inside and first in _NOT_IN_IMAGES:
            reason = f"is not in the image, which has no {first}/ (.dockerignore)"
        else:
            continue
        raise UsageError(
            f"{argument} {reason}; put it under configs/, build the image and name it by its relative path"
        )


def name_of(workdir: str) -> str:
    """A name for a job from its workdir; "" where that holds neither letters nor digits.

    >>> name_of("gs://bucket/runs/Llama3_8B/"), name_of("runs/8b")
    ('llama3-8b', 'run-8b')
    """
    last = workdir.rstrip("/").rpartition("/")[2].lower()
    name = re.sub(r"[^a-z0-9]+", "-", last).strip("-")
    if name[:1].isdigit():
        name = f"run-{name}"
    return name[:_LONGEST_NAME].rstrip("-")
