"""Tasks for SkyPilot, good and bad, and what it says of them: tests/golden/launch/sky.json.

    python -m tests.launch.sky_verdicts PYTHON

asks the SkyPilot of another interpreter anew, since it cannot be installed beside this project.
"""

import copy
import json
import subprocess
import sys
from typing import Any

from launch.sky import task
from tests.launch.jobs import GOLDEN, job

VERDICTS = GOLDEN / "sky.json"

GOOD: dict[str, dict[str, Any]] = {
    "spot": task(job(target="sky", topology="v6e:4x4", spot=True)),
    "zone": task(job(target="sky", topology="v5e:4x4", zone="us-west4-a", environment={"NAME": "it's"})),
    "region": task(job(target="sky", topology="v5p:2x2x4", zone="us-east5")),
    "v4": task(job(target="sky", topology="v4:2x2x1", spot=True)),
}

# Where in the task of "spot", and what stands there; a value of None takes it away.
BAD: dict[str, tuple[str, Any]] = {
    "misspelt num_nodes": ("nodes", 2),
    "misspelt run": ("command", "echo"),
    "nodes that are none": ("num_nodes", "two"),
    "misspelt accelerators": ("resources.accelerator", "tpu-v6e-16"),
    "accelerators that are a number": ("resources.accelerators", 16),
    "misspelt use_spot": ("resources.spot", True),
    "spot as a text": ("resources.use_spot", "yes"),
    "a cloud that is none": ("resources.infra", "gpc/us-east5"),
    "a place with too many parts": ("resources.infra", "gcp/us-east5/us-east5-a/b"),
    "a strategy that is none": ("resources.job_recovery.strategy", "ALWAYS"),
    "a status that is none": ("resources.job_recovery.recover_on_exit_codes", [300]),
    "restarts below none": ("resources.job_recovery.max_restarts_on_errors", -1),
    "run as a list": ("run", ["echo"]),
    "a name with a space": ("name", "my run"),
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """The task of "spot" with one value changed."""
    found = copy.deepcopy(GOOD["spot"])
    *folders, last = path.split(".")
    place = found
    for folder in folders:
        place = place[folder]
    place[last] = value
    return found


_ASK = """
import json, sys, sky
tasks, verdicts = json.load(sys.stdin), {}
for name, task in tasks.items():
    try:
        sky.Task.from_yaml_config(task)
        verdicts[name] = ""
    except ValueError as error:
        verdicts[name] = " ".join(str(error).split())
json.dump({"skypilot": sky.__version__, "verdicts": verdicts}, sys.stdout)
"""


def update(python: str) -> None:
    """Writes what the SkyPilot of that interpreter says."""
    tasks = GOOD | {name: changed(*how) for name, how in BAD.items()}
    asked = subprocess.run([python, "-c", _ASK], input=json.dumps(tasks), capture_output=True, text=True, check=True)
    VERDICTS.write_text(json.dumps(json.loads(asked.stdout[asked.stdout.index("{") :]), indent=2) + "\n")


if __name__ == "__main__":
    update(sys.argv[1])
