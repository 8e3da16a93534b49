"""Checks a JobSet before it is submitted, without a cluster: schemas, and what no schema says.

    python -m launch.validate FILE ...      any manifest, by whomever it was written

A cluster checks only the outer JobSet when it is created. What is wrong with the Job inside shows later, as pods that
never come. The schemas need the extra [launch]; what no schema says (semantics.py) needs nothing.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from launch.validate import semantics
from launch.validate.jobset_schema import JOBSET
from t5x_like.core.errors import UsageError

# The oldest Kubernetes that Google Kubernetes Engine still offers; a field that it lacks is refused.
KUBERNETES = "1.32"


def require(document: Mapping[str, Any]) -> Sequence[str]:
    """UsageError with everything that is wrong with a JobSet; notes about what could not be looked at."""
    found = problems(document)
    if found:
        raise UsageError(f"the JobSet would not run: {'; '.join(found)}")
    if not has_schemas():
        return ("schemas of Kubernetes were not looked at: pip install 't5x_like[launch]'",)
    return ()


def problems(document: Mapping[str, Any]) -> list[str]:
    """What is wrong with a JobSet, each in one line with its path; [] where nothing is."""
    if has_schemas():
        return _schemas(document) or semantics.problems(document)
    try:
        return semantics.problems(document)
    except (KeyError, TypeError, AttributeError) as error:  # what the schemas would have named
        return [f"the document is no JobSet as it should be ({type(error).__name__}: {error})"]


def has_schemas() -> bool:
    return all(importlib.util.find_spec(name) for name in ("jsonschema", "kubernetes_validate"))


def _schemas(document: Mapping[str, Any]) -> list[str]:
    import jsonschema

    validator = jsonschema.Draft202012Validator(JOBSET)
    errors = sorted(validator.iter_errors(document), key=lambda error: list(map(str, error.absolute_path)))
    found = [f"{_path(error.absolute_path)}: {error.message}" for error in errors]
    for index, entry in enumerate([] if found else document["spec"]["replicatedJobs"]):
        found += _child(entry["template"], f"spec.replicatedJobs[{index}].template")
    return found


def _child(template: Mapping[str, Any], path: str) -> list[str]:
    """The Job that the controller will make of a template, strictly: unknown fields are errors."""
    import kubernetes_validate

    job = {"apiVersion": "batch/v1", "kind": "Job", **template}
    try:
        kubernetes_validate.validate(job, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{path}.{_path(error.path)}: {error.message}"]
    return []


def _path(parts: Any) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.lstrip(".") or "the document"
