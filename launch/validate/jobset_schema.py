"""The fields of a JobSet (jobset.x-k8s.io/v1alpha2) as a JSON schema, written from its API types, version 0.13.

It ends where the Job begins: `template` is a Job's, which Kubernetes' own schema describes. Of `metadata` only what a
person writes is allowed.
"""

from typing import Any

_TEXT = {"type": "string", "minLength": 1}
_COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_TEXTS = {"type": "array", "items": _TEXT, "uniqueItems": True}
_LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
_ACTIONS = (
    "FailJobSet",
    "RestartJobSet",
    "RestartJobSetAndIgnoreMaxRestarts",
    "RestartJob",
    "RestartJobAndIgnoreMaxRestarts",
)


def _object(required: str, **fields: Any) -> dict[str, Any]:
    """An object of these fields alone; `required` names those that must be there."""
    return {"type": "object", "properties": fields, "required": required.split(), "additionalProperties": False}


_METADATA = _object("name", name=_TEXT, namespace=_TEXT, labels=_LABELS, annotations=_LABELS)

_RULE = _object(
    "action",
    name=_TEXT,
    action={"enum": list(_ACTIONS)},
    onJobFailureReasons=_TEXTS,
    onJobFailureMessagePatterns=_TEXTS,
    targetReplicatedJobs=_TEXTS,
)

_REPLICATED_JOB = _object(
    "name template",
    name=_TEXT,
    groupName=_TEXT,
    replicas=_COUNT,
    template=_object("spec", metadata={"type": "object"}, spec={"type": "object"}),
    dependsOn={
        "type": "array",
        "maxItems": 5,
        "items": _object("name status", name=_TEXT, status={"enum": ["Ready", "Complete"]}),
    },
)

_SPEC = _object(
    "replicatedJobs",
    replicatedJobs={"type": "array", "minItems": 1, "items": _REPLICATED_JOB},
    ttlSecondsAfterFinished=_COUNT,
    suspend={"type": "boolean"},
    managedBy=_TEXT,
    network=_object(
        "",
        enableDNSHostnames={"type": "boolean"},
        subdomain=_TEXT,
        publishNotReadyAddresses={"type": "boolean"},
    ),
    successPolicy=_object("operator", operator={"enum": ["All", "Any"]}, targetReplicatedJobs=_TEXTS),
    failurePolicy=_object(
        "",
        maxRestarts=_COUNT,
        restartStrategy={"enum": ["Recreate", "BlockingRecreate", "InPlaceRestart"]},
        rules={"type": "array", "items": _RULE},
    ),
    startupPolicy=_object("startupPolicyOrder", startupPolicyOrder={"enum": ["AnyOrder", "InOrder"]}),
    coordinator=_object("replicatedJob", replicatedJob=_TEXT, jobIndex=_COUNT, podIndex=_COUNT),
    volumeClaimPolicies={"type": "array", "maxItems": 50, "items": {"type": "object"}},
)

JOBSET = _object(
    "apiVersion kind metadata spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=_METADATA,
    spec=_SPEC,
)
