"""What must hold in a JobSet and no schema says: slices and their machines, names with all suffixes, failure policies.

Each check yields lines with the path, the value, what was expected and what to do. They take a document that has the
right types. Rules of JobSet are those that its own admission webhook has; of TPUs, those of Google Kubernetes Engine.
"""

import collections
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from launch.job import check_image
from t5x_like.core import accelerators
from t5x_like.core.errors import UsageError

_LONGEST_NAME = 63
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # DNS-1035
_RULE_NAME = re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?")
_REASONS = ("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy")
_MOST_REPLICAS_ALONE = 1024  # with actions that restart one Job
_TPU = "google.com/tpu"
_ACCELERATOR = "cloud.google.com/gke-tpu-accelerator"
_TOPOLOGY = "cloud.google.com/gke-tpu-topology"
_SPOT = "cloud.google.com/gke-spot"
_RESERVATION = "cloud.google.com/reservation-name"
_MACHINE = "node.kubernetes.io/instance-type"
_TAINTS = {_TPU: "present", _SPOT: "true"}  # with the effect NoSchedule
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")  # DNS-1123
_LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
_EXCLUSIVE = "alpha.jobset.sigs.k8s.io/exclusive-topology"
_QUEUE = "kueue.x-k8s.io/queue-name"
_MOST = 2**31 - 1
_MEGASCALE = ("MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS")
_JOB_INDEX = "jobset.sigs.k8s.io/job-index"
_COUNTS = ("parallelism", "completions", "backoffLimit", "backoffLimitPerIndex", "ttlSecondsAfterFinished")
# What Python's regular expressions know and RE2 does not, where no escape and no class of characters hides it.
_NOT_RE2 = re.compile(r"\(\?(?:[=!>(#]|<[=!]|P=)|[*+?}]\+")
_BACK_REFERENCE = re.compile(r"\\[1-9]")

Lines = Iterator[str]


class _Job:
    """A replicated job of the set: the parts that checks look at, and where they stand."""

    def __init__(self, document: Mapping[str, Any], index: int):
        self.entry = document["spec"]["replicatedJobs"][index]
        self.path = f"spec.replicatedJobs[{index}]"
        self.name: str = self.entry["name"]
        self.replicas: int = self.entry.get("replicas", 1)
        self.spec: Mapping[str, Any] = self.entry["template"]["spec"]
        self.pod: Mapping[str, Any] = self.spec["template"]["spec"]
        self.pod_path = f"{self.path}.template.spec.template.spec"
        self.containers: Sequence[Mapping[str, Any]] = self.pod["containers"]
        self.selector: Mapping[str, str] = self.pod.get("nodeSelector") or {}
        self.tolerations: Sequence[Mapping[str, Any]] = self.pod.get("tolerations") or []

    @property
    def pods(self) -> int:
        return self.spec.get("completions") or self.spec.get("parallelism") or 1


def problems(document: Mapping[str, Any]) -> list[str]:
    """Every line of every check."""
    jobs = [_Job(document, index) for index in range(len(document["spec"]["replicatedJobs"]))]
    of_job: Sequence[Callable[[_Job], Lines]] = (_slice, _chips, _capacity, _failures, _containers)
    found = [line for job in jobs for check in of_job for line in check(job)]
    of_set: Sequence[Callable[[Mapping[str, Any], Sequence[_Job]], Lines]] = (
        *(_names, _labels, _rules, _in_place, _order, _apart, _slices_together),
    )
    return [*found, *(line for check in of_set for line in check(document, jobs))]


def _slice(job: _Job) -> Lines:
    """Accelerator label, topology and machine type belong together, and the pods are the machines of a slice."""
    label, shape = job.selector.get(_ACCELERATOR), job.selector.get(_TOPOLOGY)
    where = f"{job.pod_path}.nodeSelector"
    if label is None and shape is None:
        return
    if label is None or shape is None:
        yield f"{where}: {_ACCELERATOR} and {_TOPOLOGY} belong together; give both"
        return
    labels = {row.gke: name for name, row in accelerators.GENERATIONS.items()}
    if label not in labels:
        yield f"{where}.{_ACCELERATOR}={label} is no TPU; there are {', '.join(labels)}"
        return
    try:
        found = accelerators.parse(f"{labels[label]}:{shape}")
        vms, machine = found.vms, found.machine
    except UsageError as error:
        yield f"{where}.{_TOPOLOGY}={shape}: {str(error).removeprefix('--topology=')}"
        return
    for field in ("parallelism", "completions"):
        if job.spec.get(field) != vms:
            yield (
                f"{job.path}.template.spec.{field}={job.spec.get(field)} x {found.vm_chips} chips is not {shape}, "
                f"which has {found.chips}; set {field} to {vms}"
            )
    if job.selector.get(_MACHINE, machine) != machine:
        yield f"{where}.{_MACHINE}={job.selector[_MACHINE]} has no {label} of {shape}; set {machine}"
    held = [_quantity(container) for container in job.containers]
    if all(isinstance(each, int) for each in held) and sum(each or 0 for each in held) != found.vm_chips:
        yield (
            f"{job.pod_path}: {_TPU} is {sum(each or 0 for each in held)}, but a machine of {label} {shape} has "
            f"{found.vm_chips} chips; ask for all of them"
        )
    if job.replicas > 1 and vms == 1:
        yield f"{job.path}.replicas={job.replicas}: slices that work together have several machines; {shape} has one"
    if job.spec.get("completionMode", "Indexed") != "Indexed":
        yield f"{job.path}.template.spec.completionMode={job.spec['completionMode']} should be Indexed"


def _chips(job: _Job) -> Lines:
    """A TPU is asked for in whole chips, by a selector that finds it and with a toleration that lets it in."""
    asked = [container for container in job.containers if _quantity(container) is not None]
    for container in asked:
        if not isinstance(_quantity(container), int):
            yield (
                f"{job.pod_path}.containers[{container['name']}].resources: {_TPU}={_quantity(container)!r} should be "
                "a whole number of chips"
            )
        limits, requests = (_resources(container, name).get(_TPU) for name in ("limits", "requests"))
        if limits is not None and requests is not None and str(limits) != str(requests):
            yield (
                f"{job.pod_path}.containers[{container['name']}].resources: {_TPU} has the limit {limits} and the "
                f"request {requests}, which must be equal; leave out the request"
            )
    if asked and _ACCELERATOR not in job.selector:
        yield f"{job.pod_path}: {_TPU} is asked for without nodeSelector {_ACCELERATOR} and {_TOPOLOGY}; give them"
    if _ACCELERATOR in job.selector and not asked:
        yield f"{job.pod_path}: nodeSelector names a TPU, but no container asks for {_TPU}; set resources.limits"
    if asked and not _tolerated(job, _TPU):
        yield f"{job.pod_path}.tolerations has none for {_TPU}, whose taint keeps pods away; add operator Exists"


def _capacity(job: _Job) -> Lines:
    """Spot machines are tainted, and a reservation is never of them."""
    if _SPOT in job.selector and job.selector[_SPOT] != "true":
        yield f"{job.pod_path}.nodeSelector.{_SPOT}={job.selector[_SPOT]!r} should be 'true'"
    if _SPOT in job.selector and not _tolerated(job, _SPOT):
        yield f"{job.pod_path}.nodeSelector asks for spot machines and tolerations has none for {_SPOT}; add it"
    if _SPOT in job.selector and _RESERVATION in job.selector:
        yield f"{job.pod_path}.nodeSelector asks for spot machines and a reservation; take one of them out"
    for name, value in job.selector.items():
        if not _LABEL.fullmatch(str(value)) or len(str(value)) > _LONGEST_NAME:
            yield (
                f"{job.pod_path}.nodeSelector.{name}={value} is no value of a label; use letters, digits and -_. , at "
                f"most {_LONGEST_NAME}"
            )


def _failures(job: _Job) -> Lines:
    """What Kubernetes refuses when the controller makes the Job, which shows as pods that never come."""
    policy = job.spec.get("podFailurePolicy")
    restart = job.pod.get("restartPolicy")
    if policy is not None and restart != "Never":
        given = f"restartPolicy={restart}" if restart else "restartPolicy is missing, and JobSet makes it OnFailure"
        yield f"{job.pod_path}: {given}, with which podFailurePolicy is refused; set restartPolicy: Never"
    names = {container["name"] for container in job.containers}
    for name in _COUNTS:
        if isinstance(job.spec.get(name), int) and not 0 <= job.spec[name] <= _MOST:
            yield f"{job.path}.template.spec.{name}={job.spec[name]} should be between 0 and {_MOST}"
    for index, rule in enumerate((policy or {}).get("rules") or []):
        path = f"{job.path}.template.spec.podFailurePolicy.rules[{index}]"
        statuses = rule.get("onExitCodes") or {}
        if "containerName" in statuses and statuses["containerName"] not in names:
            yield f"{path}: there is no container {statuses['containerName']}; there are {', '.join(sorted(names))}"
        if statuses.get("operator") == "In" and 0 in statuses.get("values", ()):
            yield f"{path}: exit status 0 is no failure; take it out"
        if rule.get("action") == "FailIndex" and "backoffLimitPerIndex" not in job.spec:
            yield f"{path}: FailIndex needs backoffLimitPerIndex"


def _containers(job: _Job) -> Lines:
    """Images for good, and nothing that a template has left behind."""
    if not job.containers:
        yield f"{job.pod_path}.containers is empty; give the one that runs the program"
    for container in job.containers:
        try:
            check_image(str(container.get("image", "")))
        except UsageError as error:
            line = str(error).removeprefix("--image=")
            yield f"{job.pod_path}.containers[{container['name']}].image={line}"
        doubles = collections.Counter(each["name"] for each in container.get("env") or [])
        for name in (name for name, count in doubles.items() if count > 1):
            yield f"{job.pod_path}.containers[{container['name']}].env has {name} twice; keep one"
    for secret in job.pod.get("imagePullSecrets") or []:
        if secret.get("name") in (None, "", "None"):
            yield f"{job.pod_path}.imagePullSecrets names {secret.get('name')!r}; give a secret or leave it out"


def _names(document: Mapping[str, Any], jobs: Sequence[_Job]) -> Lines:
    """Names with the suffixes of the largest indices; pods get five random characters besides."""
    name = document["metadata"]["name"]
    if not _NAME.fullmatch(name):
        yield f"metadata.name={name} should be of a-z, 0-9 and -, begin with a letter and not end with -"
    doubles = [each for each, count in collections.Counter(job.name for job in jobs).items() if count > 1]
    if doubles:
        yield f"spec.replicatedJobs: two are named {doubles[0]}; names must differ"
    for job in jobs:
        longest = f"{name}-{job.name}-{max(job.replicas - 1, 0)}-{max(job.pods - 1, 0)}-abcde"
        if not _NAME.fullmatch(job.name):
            yield f"{job.path}.name={job.name} should be of a-z, 0-9 and -, begin with a letter and not end with -"
        if len(longest) > _LONGEST_NAME:
            over = len(longest) - _LONGEST_NAME
            yield (
                f"metadata.name={name}: its pods would have names such as {longest}, of {len(longest)} characters, and "
                f"{_LONGEST_NAME} is the most; shorten the name by {over}, to {max(len(name) - over, 0)} or less"
            )
    subdomain = ((document["spec"].get("network") or {}).get("subdomain")) or name
    if len(subdomain) > _LONGEST_NAME or not _NAME.fullmatch(subdomain):
        yield f"spec.network.subdomain={subdomain} should be a name of at most {_LONGEST_NAME} characters"


def _labels(document: Mapping[str, Any], jobs: Sequence[_Job]) -> Lines:
    """Namespace and queue are names, where they are given."""
    metadata = document["metadata"]
    namespace, queue = metadata.get("namespace"), (metadata.get("labels") or {}).get(_QUEUE)
    if namespace is not None and (not _NAMESPACE.fullmatch(namespace) or len(namespace) > _LONGEST_NAME):
        yield f"metadata.namespace={namespace} should be of a-z, 0-9 and -, in at most {_LONGEST_NAME} characters"
    if queue is not None and (not _NAMESPACE.fullmatch(queue) or len(queue) > _LONGEST_NAME):
        yield f"metadata.labels[{_QUEUE}]={queue!r} names no queue; give its name or leave the label out"


def _rules(document: Mapping[str, Any], jobs: Sequence[_Job]) -> Lines:
    """The rules of the set's failure policy, as JobSet's webhook has them."""
    names = [job.name for job in jobs]
    policy = document["spec"].get("failurePolicy") or {}
    seen: set[str] = set()
    for index, rule in enumerate(policy.get("rules") or []):
        path, name = f"spec.failurePolicy.rules[{index}]", rule.get("name", f"failurePolicyRule{index}")
        if not _RULE_NAME.fullmatch(name) or len(name) > 128:
            yield f"{path}.name={name} should be of letters, digits and _ , : (no -), begin with a letter"
        if name in seen:
            yield f"{path}.name={name} is the name of another rule; names must differ"
        seen.add(name)
        for reason in rule.get("onJobFailureReasons") or []:
            if reason not in _REASONS:
                yield f"{path}.onJobFailureReasons: {reason} is none; there are {', '.join(_REASONS)}"
        for pattern in rule.get("onJobFailureMessagePatterns") or []:
            if reason := _not_re2(pattern):
                yield f"{path}.onJobFailureMessagePatterns: {pattern!r} is no regular expression: {reason}"
        for target in rule.get("targetReplicatedJobs") or []:
            if target not in names:
                yield f"{path}.targetReplicatedJobs: there is no {target}; there are {', '.join(names)}"
        alone = rule["action"] in ("RestartJob", "RestartJobAndIgnoreMaxRestarts")
        if alone and any(job.replicas > _MOST_REPLICAS_ALONE for job in jobs):
            yield f"{path}.action={rule['action']} takes at most {_MOST_REPLICAS_ALONE} replicas"
    for target in (document["spec"].get("successPolicy") or {}).get("targetReplicatedJobs") or []:
        if target not in names:
            yield f"spec.successPolicy.targetReplicatedJobs: there is no {target}; there are {', '.join(names)}"


def _not_re2(pattern: str) -> str:
    """Why JobSet, which uses RE2, cannot take a pattern; "" where it can."""
    try:
        re.compile(pattern)
    except re.error as error:
        return str(error)
    bare = re.sub(r"\\[^1-9]", "x", pattern)
    bare = re.sub(r"\[\^?\]?[^]]*\]", "x", bare)
    found = _NOT_RE2.search(bare) or _BACK_REFERENCE.search(bare)
    return f"RE2 has no {found[0]}" if found else ""


def _in_place(document: Mapping[str, Any], jobs: Sequence[_Job]) -> Lines:
    """InPlaceRestart starts containers again, which a Job must neither count nor replace."""
    if (document["spec"].get("failurePolicy") or {}).get("restartStrategy") != "InPlaceRestart":
        return
    for job in jobs:
        path, spec = f"{job.path}.template.spec", job.spec
        if spec.get("backoffLimit") != _MOST:
            yield f"{path}.backoffLimit={spec.get('backoffLimit')}: InPlaceRestart needs {_MOST}"
        if spec.get("podReplacementPolicy") != "Failed":
            yield f"{path}.podReplacementPolicy={spec.get('podReplacementPolicy')}: InPlaceRestart needs Failed"
        if spec.get("completions") != spec.get("parallelism"):
            yield f"{path}.completions={spec.get('completions')}: InPlaceRestart needs as many as parallelism"


def _order(document: Mapping[str, Any], jobs: Sequence[_Job]) -> Lines:
    """A replicated job waits for earlier ones alone; the coordinator is one of them."""
    for index, job in enumerate(jobs):
        for other in job.entry.get("dependsOn") or []:
            if other["name"] not in [each.name for each in jobs[:index]]:
                yield f"{job.path}.dependsOn: {other['name']} does not stand before {job.name}; put it first"
    coordinator = document["spec"].get("coordinator")
    if coordinator:
        found = [job for job in jobs if job.name == coordinator["replicatedJob"]]
        if not found:
            yield f"spec.coordinator.replicatedJob={coordinator['replicatedJob']} is none of the replicated jobs"
        elif coordinator.get("jobIndex", 0) >= found[0].replicas or coordinator.get("podIndex", 0) >= found[0].pods:
            yield "spec.coordinator is beyond the last job or pod"


def _apart(document: Mapping[str, Any], jobs: Sequence[_Job]) -> Lines:
    """Several slices lie in node pools of their own: one exclusive to each, or a topology that Kueue keeps to."""
    for job in jobs:
        template = job.entry["template"].get("metadata") or {}
        pods = (job.spec["template"].get("metadata") or {}).get("annotations") or {}
        annotations = (document["metadata"].get("annotations") or {}) | (template.get("annotations") or {})
        by_kueue = any(name.startswith("kueue.x-k8s.io/podset-") for name in pods)
        if job.replicas > 1 and _ACCELERATOR in job.selector and _EXCLUSIVE not in annotations and not by_kueue:
            yield (
                f"metadata.annotations has no {_EXCLUSIVE}, so pods of {job.replicas} slices may mix in a node pool; "
                "set it to cloud.google.com/gke-nodepool"
            )


def _slices_together(document: Mapping[str, Any], jobs: Sequence[_Job]) -> Lines:
    """What processes are told of the other slices is true."""
    for job in jobs:
        for container in job.containers:
            given = {each["name"]: each.get("value") for each in container.get("env") or []}
            named = [name for name in _MEGASCALE if name in given]
            path = f"{job.pod_path}.containers[{container['name']}].env"
            # None of them is sound: then Google Kubernetes Engine says them, as xpk has it.
            if named and len(named) < len(_MEGASCALE):
                missing = [name for name in _MEGASCALE if name not in given]
                yield f"{path} has {named[0]} without {' and '.join(missing)}; give all of them or none"
            index = given.get("MEGASCALE_SLICE_ID")
            if index is not None and job.replicas > 1:
                yield f"{path}: MEGASCALE_SLICE_ID={index} on all slices; take it from the label {_JOB_INDEX}"
            count = given.get("MEGASCALE_NUM_SLICES")
            if count is not None and count != str(job.replicas):
                yield f"{path}: MEGASCALE_NUM_SLICES={count}, but there are {job.replicas}; set replicas' number"
            address = given.get("MEGASCALE_COORDINATOR_ADDRESS")
            subdomain = (document["spec"].get("network") or {}).get("subdomain") or document["metadata"]["name"]
            first = f"{document['metadata']['name']}-{job.name}-0-0.{subdomain}"
            hidden = (document["spec"].get("network") or {}).get("enableDNSHostnames") is False
            if address is not None and hidden and "-" in address.partition(".")[0]:
                yield f"spec.network.enableDNSHostnames=False, but {address} is to be found; leave it out"
            if address is not None and address.partition(":")[0] != first:
                yield f"{path}: MEGASCALE_COORDINATOR_ADDRESS={address} is not the first pod's; set {first}"


def _quantity(container: Mapping[str, Any]) -> Any:
    """The chips that a container asks for: an int, None where it asks for none, else what it says."""
    given = _resources(container, "limits").get(_TPU, _resources(container, "requests").get(_TPU))
    return int(given) if isinstance(given, str) and re.fullmatch(r"[0-9]{1,9}", given) else given


def _resources(container: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    return (container.get("resources") or {}).get(kind) or {}


def _tolerated(job: _Job, key: str) -> bool:
    """Whether one toleration matches the taint as Kubernetes does; without a key it is for all, and says Exists."""
    for each in job.tolerations:
        exists = each.get("operator") == "Exists"
        named = each.get("key") == key or (exists and not each.get("key"))
        right = exists or each.get("value", "") == _TAINTS[key]
        if named and right and each.get("effect") in (None, "", "NoSchedule"):
            return True
    return False
