"""What a cluster does with a JobSet, on one machine: its failure policies as values, and its pods as processes.

The policies are read as Kubernetes 1.32 (pkg/controller/job/pod_failure_policy.go) and JobSet 0.13 (failure_policy.go)
read them. Pods run the command of their container, with the environment of the manifest and what Google Kubernetes
Engine adds to it; all of them on loopback, which stands for the cluster's network and its DNS.
"""

import dataclasses
import re
import subprocess
import sys
import threading
import time

from launch import local

_REASON = "PodFailurePolicy"


@dataclasses.dataclass(frozen=True)
class Pod:
    """slice, worker: index of its Job, and its own in that."""

    slice: int
    worker: int


def job_failure(document, pod: Pod, status: int, *, disrupted: bool) -> tuple[str, str]:
    """(reason, message) of a Job one of whose pods ended with this status, a machine taken away or not."""
    (replicated,) = document["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    name = f"{document['metadata']['name']}-{replicated['name']}-{pod.slice}-{pod.worker}-x7k2p"
    for index, rule in enumerate(spec["podFailurePolicy"]["rules"]):
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions")
        if codes:
            listed = status in codes["values"]
            if listed == (codes["operator"] == "In"):
                container = codes["containerName"]
                ended = f"Container {container} for pod default/{name} failed with exit code {status}"
                return _REASON, f"{ended} matching {rule['action']} rule at index {index}"
        elif disrupted and any(each["type"] == "DisruptionTarget" for each in conditions):
            return _REASON, f"Pod default/{name} has condition DisruptionTarget matching FailJob rule at index {index}"
    return "BackoffLimitExceeded", "Job has reached the specified backoff limit"


def action(document, reason: str, message: str) -> str:
    """What the set does when a Job has failed so: the first rule that matches, else a restart that is counted."""
    for rule in document["spec"]["failurePolicy"].get("rules", []):
        reasons, patterns = rule.get("onJobFailureReasons"), rule.get("onJobFailureMessagePatterns")
        if (not reasons or reason in reasons) and (
            not patterns or any(re.search(pattern, message) for pattern in patterns)
        ):
            return rule["action"]
    return "RestartJobSet"


def environment(document, pod: Pod, *, port: int) -> dict[str, str]:
    """Of the container of a pod. The name of the first pod and those of the slice's pods are loopback here."""
    (replicated,) = document["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    labels = {"jobset.sigs.k8s.io/job-index": str(pod.slice)}
    first = f"{document['metadata']['name']}-{replicated['name']}-0-0.{document['metadata']['name']}"
    given = {}
    for each in container["env"]:
        field = each.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
        value = each["value"] if "value" in each else labels[field.partition("['")[2].rstrip("']")]
        given[each["name"]] = "127.0.0.1" if value == first else value
    of_gke = {
        "TPU_WORKER_ID": str(pod.worker),
        "TPU_WORKER_HOSTNAMES": ",".join(["127.0.0.1"] * spec["completions"]),
        "TPU_SKIP_MDS_QUERY": "true",
        "JOB_COMPLETION_INDEX": str(pod.worker),
    }
    return given | of_gke | {"JAX_COORDINATOR_PORT": str(port)}


def pods(document) -> list[Pod]:
    (replicated,) = document["spec"]["replicatedJobs"]
    workers = range(replicated["template"]["spec"]["completions"])
    return [Pod(index, worker) for index in range(replicated["replicas"]) for worker in workers]


class Attempt:
    """The processes of one start of the set, in the order of `pods`, and what they print."""

    def __init__(self, document, given: dict[str, str], *, module: str):
        port = local.free_port()
        (container,) = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
        python, dash, program, *arguments = container["command"]
        assert (python, dash, program) == ("python", "-m", "t5x_like")
        self.pods = pods(document)
        line = [sys.executable, "-m", module, *arguments]
        self.children = [local.start(line, given | environment(document, pod, port=port)) for pod in self.pods]
        self.lines: list[str] = []
        streams = [
            (pod, stream)
            for pod, child in zip(self.pods, self.children, strict=True)
            for stream in (child.stdout, child.stderr)
        ]
        self._readers = [threading.Thread(target=self._read, args=each, daemon=True) for each in streams]
        for reader in self._readers:
            reader.start()

    def _read(self, pod: Pod, stream) -> None:
        with stream:
            for line in stream:
                self.lines.append(f"[{pod.slice}-{pod.worker}] {line.rstrip()}")

    @property
    def output(self) -> str:
        return "\n".join(self.lines[-80:])

    def first_failure(self, *, seconds: float) -> tuple[Pod, int] | None:
        """(pod, status) of the first that fails; None when all are done."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            ended = {pod: child.poll() for pod, child in zip(self.pods, self.children, strict=True)}
            for pod, status in ended.items():
                if status:
                    return pod, 128 - status if status < 0 else status
            if all(status == 0 for status in ended.values()):
                return None
            time.sleep(0.05)
        raise AssertionError(f"neither done nor failed after {seconds:g} s:\n{self.output}")

    def stop(self, *, grace: float) -> None:
        """As the kubelet does: SIGTERM, and SIGKILL after the grace period."""
        for child in self.children:
            if child.poll() is None:
                child.terminate()
        deadline = time.monotonic() + grace
        for child in self.children:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        for reader in self._readers:
            reader.join(5)


@dataclasses.dataclass
class Outcome:
    """done: all pods ended with 0. actions: what was done after each failure. attempts: their output, one a start."""

    done: bool
    actions: list[str]
    attempts: list[str]


def run(document, given, *, module: str, disturb, grace: float = 20, seconds: float = 900) -> Outcome:
    """Runs a set to its end. disturb(number, attempt) is called in each start, in a thread of its own."""
    outcome = Outcome(False, [], [])
    counted = 0
    while True:
        attempt = Attempt(document, given, module=module)
        disturber = threading.Thread(target=disturb, args=(len(outcome.attempts), attempt), daemon=True)
        disturber.start()
        try:
            failed = attempt.first_failure(seconds=seconds)
        finally:
            attempt.stop(grace=grace)
            outcome.attempts.append("\n".join(attempt.lines))
        if failed is None:
            outcome.done = True
            return outcome
        outcome.actions.append(action(document, *job_failure(document, *failed, disrupted=False)))
        counted += outcome.actions[-1] == "RestartJobSet"
        if outcome.actions[-1] == "FailJobSet" or counted > document["spec"]["failurePolicy"]["maxRestarts"]:
            return outcome
