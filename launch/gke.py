"""A run as a JobSet on Google Kubernetes Engine: one Job a TPU slice, one pod a virtual machine, one process a pod.

    python -m launch.gke --config=configs/pretrain/llama3_8b.py --topology=v5p:4x4x4 --slices=2 \\
        --image=REGION-docker.pkg.dev/PROJECT/REPOSITORY/t5x_like:TAG --workdir=gs://BUCKET/llama3_8b \\
        --config.data.source=jsonl:gs://BUCKET/text/*.jsonl --config.data.tokenizer=gs://BUCKET/tokenizer \\
        --config.mesh.slice=2 [--dry_run]

A restart runs the same command, which finds its checkpoint in the workdir. What a pod's exit status does: 0 done; 75
(preempted and saved): the set starts again, not counted; 2 (wrong use): the set ends; anything else: it starts again,
at most --max_restarts times. That is so for a machine that vanishes too, as long as others are left, which end with 1.
Needs kubectl, and JobSet 0.10 or newer on the cluster.
"""

import sys
from collections.abc import Sequence
from typing import Any

import yaml

from launch import flags, validate
from launch.job import PREEMPTED, WRONG_USE, Job, check_container
from launch.submission import Step, Submission
from t5x_like.core.errors import UsageError

SLICE_JOB = "slice-job"
CONTAINER = "jax-tpu"
_NODE_POOL = "cloud.google.com/gke-nodepool"


def main(arguments: Sequence[str] | None = None) -> int:
    return flags.main(launch, arguments, target="gke", about=__doc__)


def launch(asked: flags.Asked) -> int:
    check(asked.job)
    document = manifest(asked.job)
    notes = validate.require(document)
    return flags.carry_out(asked, submission(asked.job, document, notes))


def check(job: Job) -> None:
    """UsageError, in one line, for what a pod on Google Kubernetes Engine cannot do."""
    check_container(job)
    if job.slices > 1 and job.slice.vms == 1:
        raise UsageError(
            f"--slices={job.slices} of {job.topology}: slices that work together have several machines each, and "
            "this one has one; give a larger --topology"
        )
    if job.gke.cluster and not (job.project and job.zone):
        raise UsageError(f"--cluster={job.gke.cluster} needs --project and --zone, which name kubectl's context")


def manifest(job: Job) -> dict[str, Any]:
    """The JobSet. Everything about the slice comes from the one table of accelerators."""
    metadata: dict[str, Any] = {"name": job.name, "namespace": job.gke.namespace}
    if job.gke.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": job.gke.queue}
    # One Job a node pool: a slice is one node pool, and its chips reach each other only within it.
    metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": _NODE_POOL}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "ttlSecondsAfterFinished": job.gke.keep_seconds,
            "failurePolicy": _failure_policy(job),
            "replicatedJobs": [
                {"name": SLICE_JOB, "replicas": job.slices, "template": {"spec": _slice_job(job)}},
            ],
        },
    }


def _failure_policy(job: Job) -> dict[str, Any]:
    """The first rule that matches decides; a failure that none matches restarts the set and is counted.

    A Job says why it failed in words of Kubernetes ("... failed with exit code 75 matching FailJob rule ..."), and
    only where a rule of its podFailurePolicy matched.
    """
    saved = [f"exit code {PREEMPTED} matching", "condition DisruptionTarget matching"]
    rules = [
        _rule("preempted", "RestartJobSetAndIgnoreMaxRestarts", saved),
        _rule("wrong_use", "FailJobSet", [f"exit code {WRONG_USE} matching"]),
    ]
    # Blocking: no process of the next start may begin while one of the last still saves.
    return {"maxRestarts": job.max_restarts, "restartStrategy": "BlockingRecreate", "rules": rules}


def _rule(name: str, action: str, patterns: list[str]) -> dict[str, Any]:
    reasons = ["PodFailurePolicy"]
    return {
        "name": name,
        "action": action,
        "onJobFailureReasons": reasons,
        "onJobFailureMessagePatterns": patterns,
    }


def _slice_job(job: Job) -> dict[str, Any]:
    """The Job of one slice. Any pod that fails fails it, since the others cannot go on."""
    vms = job.slice.vms
    statuses = {"containerName": CONTAINER, "operator": "In", "values": [WRONG_USE, PREEMPTED]}
    rules: list[dict[str, Any]] = [
        {"action": "FailJob", "onExitCodes": statuses},
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    return {
        "parallelism": vms,
        "completions": vms,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": rules},
        "template": {"spec": _pod(job)},
    }


def _pod(job: Job) -> dict[str, Any]:
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "nodeSelector": _node_selector(job),
        "tolerations": _tolerations(job),
        "terminationGracePeriodSeconds": job.grace_seconds,
        "containers": [_container(job)],
        "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}],
    }
    if job.gke.priority:
        pod["priorityClassName"] = job.gke.priority
    if job.gke.service_account:
        pod["serviceAccountName"] = job.gke.service_account  # whose identity pods on the host's network do not get
    else:
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    return pod


def _node_selector(job: Job) -> dict[str, str]:
    selector = {
        "cloud.google.com/gke-tpu-accelerator": job.slice.row.gke,
        "cloud.google.com/gke-tpu-topology": job.slice.shape,
    }
    if job.gke.placement_policy:
        selector["cloud.google.com/placement-policy-name"] = job.gke.placement_policy
    if job.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    if job.reservation:
        parts = job.reservation.split("/")
        selector["cloud.google.com/reservation-name"] = parts[-1]
        if len(parts) > 1:
            selector["cloud.google.com/reservation-project"] = parts[1]
    return selector


def _tolerations(job: Job) -> list[dict[str, str]]:
    found = [{"key": "google.com/tpu", "operator": "Exists"}]
    if job.spot:
        spot = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        found.append(spot)
    return found


def _container(job: Job) -> dict[str, Any]:
    return {
        "name": CONTAINER,
        "image": job.image,
        # No shell between, which would keep SIGTERM to itself.
        "command": ["python", *map(literal, job.arguments)],
        "env": _environment(job),
        "resources": {"limits": {"google.com/tpu": job.slice.vm_chips}},
        "securityContext": {"privileged": True},  # the device files of the chips belong to root
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
    }


def _environment(job: Job) -> list[dict[str, Any]]:
    """Of every process. The cluster tells a slice's pods of each other (TPU_WORKER_ID, TPU_WORKER_HOSTNAMES); where
    there are several slices this tells which is which, and where the first process listens."""
    given = {"PYTHONUNBUFFERED": "1"} | job.environment
    found: list[dict[str, Any]] = [{"name": name, "value": literal(value)} for name, value in given.items()]
    if job.slices > 1:
        index = {"fieldRef": {"fieldPath": "metadata.labels['jobset.sigs.k8s.io/job-index']"}}
        found[1:1] = [
            {"name": "MEGASCALE_NUM_SLICES", "value": str(job.slices)},
            {"name": "MEGASCALE_SLICE_ID", "valueFrom": index},
            {"name": "MEGASCALE_COORDINATOR_ADDRESS", "value": f"{job.name}-{SLICE_JOB}-0-0.{job.name}"},
        ]
    return found


def literal(text: str) -> str:
    """For commands and values of variables, in which Kubernetes replaces $$ by $ and $(NAME) by what NAME holds."""
    return text.replace("$", "$$")


def submission(job: Job, document: dict[str, Any], notes: Sequence[str]) -> Submission:
    """What is handed to kubectl, and the commands for afterwards."""
    kubectl = ["kubectl"]
    if job.gke.cluster:
        kubectl += [f"--context=gke_{job.project}_{job.zone}_{job.gke.cluster}"]
    kubectl += [f"--namespace={job.gke.namespace}"]
    first = (
        f"--selector=jobset.sigs.k8s.io/jobset-name={job.name},jobset.sigs.k8s.io/job-index=0,"
        "batch.kubernetes.io/job-completion-index=0"
    )
    text = yaml.safe_dump(document, sort_keys=False, width=10000)
    about = [
        f"JobSet {job.name}: {job.slices} x {job.slice.spelled} ({job.slice.name}), {job.slices * job.slice.vms} pods "
        f"of {job.slice.vm_chips} chips on {job.slice.machine}, {job.slices * job.slice.chips} chips in all",
        *notes,
    ]
    if not job.gke.cluster:
        ignored = [f"--{name}={getattr(job, name)}" for name in ("project", "zone") if getattr(job, name)]
        about += [f"{' '.join(ignored)} not used: without --cluster kubectl's own is asked"] if ignored else []
    return Submission(
        about=tuple(about),
        steps=(Step((*kubectl, "create", "--filename=-"), document=text),),
        afterwards={
            "state": (*kubectl, "get", "jobset", job.name),
            "watch the first process": (*kubectl, "logs", "--follow", first),
            "pause; all save, and false goes on": (
                *kubectl,
                "patch",
                "jobset",
                job.name,
                "--type=merge",
                '--patch={"spec":{"suspend":true}}',
            ),
            "stop and delete; all save": (*kubectl, "delete", "jobset", job.name),
        },
    )


if __name__ == "__main__":
    sys.exit(main())
