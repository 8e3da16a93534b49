"""Checks a task of SkyPilot before it is submitted: by a small schema of ours, and by SkyPilot where it is installed.

SkyPilot cannot be installed beside this project (0.14.1 wants click below 8.2 and uvicorn below 0.36), so the schema
holds what it has said of tasks such as ours: tests/golden/launch/sky.json, written by tests/launch/sky_verdicts.py.
"""

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from t5x_like.core.errors import UsageError

_STATUS = {"type": "integer", "minimum": 0, "maximum": 255}
_RECOVERY = {
    "type": "object",
    "additionalProperties": False,
    "required": ["strategy"],
    "properties": {
        "strategy": {"enum": ["FAILOVER", "EAGER_NEXT_REGION"]},
        "max_restarts_on_errors": {"type": "integer", "minimum": 0},
        "recover_on_exit_codes": {"type": "array", "items": _STATUS, "uniqueItems": True},
    },
}
_RESOURCES = {
    "type": "object",
    "additionalProperties": False,
    "required": ["infra", "accelerators", "accelerator_args"],
    "properties": {
        "infra": {"type": "string", "pattern": "^gcp(/[a-z]+-[a-z]+[0-9]+(/[a-z]+-[a-z]+[0-9]+-[a-z])?)?$"},
        "accelerators": {"type": "string", "pattern": "^tpu-(v4|v5litepod|v5p|v6e)-[0-9]+$"},
        "accelerator_args": {
            "type": "object",
            "additionalProperties": False,
            "required": ["runtime_version"],
            "properties": {"runtime_version": {"type": "string", "minLength": 1}},
        },
        "use_spot": {"type": "boolean"},
        "job_recovery": _RECOVERY,
    },
}
TASK = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name", "resources", "run"],
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"},
        "resources": _RESOURCES,
        "num_nodes": {"type": "integer", "minimum": 1},
        "run": {"type": "string"},
    },
}


def require(document: Mapping[str, Any]) -> Sequence[str]:
    """UsageError with everything that is wrong with a task; notes about what could not be looked at."""
    found = problems(document)
    if found:
        raise UsageError(f"the task would not run: {'; '.join(found)}")
    if importlib.util.find_spec("jsonschema") is None:
        return ("the schema of tasks was not looked at: pip install 't5x_like[launch]'",)
    return ()


def problems(document: Mapping[str, Any]) -> list[str]:
    """What is wrong with a task, each in one line; [] where nothing is."""
    found = _of_schema(document) if importlib.util.find_spec("jsonschema") else []
    return found or (_of_sky(document) if importlib.util.find_spec("sky") else [])


def _of_schema(document: Mapping[str, Any]) -> list[str]:
    import jsonschema

    errors = jsonschema.Draft202012Validator(TASK).iter_errors(document)
    return [f"{'.'.join(map(str, error.absolute_path)) or 'the task'}: {error.message}" for error in errors]


def _of_sky(document: Mapping[str, Any]) -> list[str]:
    sky: Any = importlib.import_module("sky")
    try:
        sky.Task.from_yaml_config(dict(document))
    except ValueError as error:
        return [" ".join(str(error).split())]
    return []
