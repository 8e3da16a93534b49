"""The jobs that tests of launchers describe, and what xpk 1.16.0 made of the same ones (tests/golden/launch/xpk)."""

import os
import pathlib
import subprocess

import yaml

from launch import flags
from launch.job import Job

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "launch"
UPDATE = os.environ.get("T5X_LIKE_UPDATE_GOLDEN") == "1"
CONFIG = "--config=configs/pretrain/tiny.py"
USUAL = {
    "workdir": "gs://bucket/runs/llama",
    "image": "us-docker.pkg.dev/project/images/t5x_like:1",
    "topology": "v5p:4x4x4",
}
CLUSTER = {"cluster": "cluster", "project": "project", "zone": "us-east5-a"}

# As xpk is asked for them, by launch.xpk.
ALIKE = {
    "v6e_one_slice": {"topology": "v6e:4x4"},
    "v6e_one_machine": {"topology": "v6e:2x2", "environment": {"LEVEL": "1"}},
    "v5p_two_slices": {"topology": "v5p:2x2x4", "slices": 2, "max_restarts": 3},
    "v5p_four_long_slices": {"topology": "v5p:4x4x16", "slices": 4, "priority": "high", "grace_seconds": 60},
    "v5e_eight_slices": {"topology": "v5e:16x16", "slices": 8, "keep_seconds": 600},
    "tpu7x_two_slices": {"topology": "tpu7x:4x4x8", "slices": 2},
    "v4_one_slice": {"topology": "v4:8x4x4"},
}


def job(*config: str, file: str = CONFIG, target: str = "gke", **values) -> Job:
    """A job of the tiny config, with the usual values of these tests unless others are given."""
    return flags.describe([file, *config], USUAL | values, target=target)


def alike(name: str) -> Job:
    return job(target="xpk", **(CLUSTER | ALIKE[name]))


def of_xpk(name: str) -> dict:
    """The JobSet that xpk makes of a job of ALIKE."""
    return yaml.safe_load((GOLDEN / "xpk" / f"{name}.yaml").read_text())


def update(xpk: str) -> None:
    """Asks xpk anew: `python -m tests.launch.jobs PATH_OF_XPK` from the root of the checkout."""
    from launch.xpk import create

    for name in ALIKE:
        command = [xpk, *create(alike(name))[1:], "--dry-run", "--skip-validation"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        begin = printed.index("apiVersion: jobset")
        text = printed[begin : printed.index("[XPK]", begin)]
        lines = [line.rstrip() for line in text.rstrip().splitlines()]
        (GOLDEN / "xpk" / f"{name}.yaml").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    import sys

    update(sys.argv[1])
