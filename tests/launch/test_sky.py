"""launch/sky.py: its tasks beside what SkyPilot said of them, and the shell text of a machine run by bash."""

import importlib.util
import json
import os
import subprocess
from typing import Any

import pytest
import yaml

from launch import sky
from launch.sky import main
from launch.validate import sky_task
from tests.launch.jobs import CONFIG, GOLDEN, UPDATE, USUAL, job
from tests.launch.sky_verdicts import BAD, GOOD, VERDICTS, changed

SAID = json.loads(VERDICTS.read_text())["verdicts"]
needs_schemas = pytest.mark.skipif(importlib.util.find_spec("jsonschema") is None, reason="jsonschema is not installed")
# SkyPilot finds these out later, when it has started a machine for it.
STRICTER = {"a strategy that is none", "a name with a space"}


def test_the_whole_task():
    of = job(target="sky", topology="v6e:4x4", spot=True, zone="us-east5-b", environment={"NAME": "it's"})
    document = sky.submission(of, sky.task(of)).steps[1].document
    if UPDATE:
        (GOLDEN / "sky.yaml").write_text(document)
    assert document == (GOLDEN / "sky.yaml").read_text()
    assert yaml.safe_load(document) == sky.task(of)


@needs_schemas
@pytest.mark.parametrize("name", GOOD)
def test_skypilot_takes_every_task_of_ours(name):
    assert SAID[name] == "" and sky_task.problems(GOOD[name]) == []


@needs_schemas
@pytest.mark.parametrize("name", BAD)
def test_the_schema_refuses_what_skypilot_refuses(name):
    assert (SAID[name] == "") == (name in STRICTER)
    (line,) = sky_task.problems(changed(*BAD[name]))
    wrong: Any = BAD[name][0].rpartition(".")[2]
    assert wrong in line or str(BAD[name][1]) in line


def test_a_place_is_named_as_skypilot_names_it():
    zones = {"": "gcp", "us-east5": "gcp/us-east5", "us-east5-b": "gcp/us-east5/us-east5-b"}
    assert {zone: sky.infra(job(target="sky", zone=zone)) for zone in zones} == zones
    strategies = {
        zone: sky.task(job(target="sky", zone=zone))["resources"]["job_recovery"]["strategy"] for zone in zones
    }
    assert list(strategies.values()) == ["EAGER_NEXT_REGION", "FAILOVER", "FAILOVER"]


def test_the_runtime_of_v5e_is_not_that_of_v5p():
    found = {name: GOOD[name]["resources"]["accelerator_args"]["runtime_version"] for name in ("zone", "region")}
    assert found == {"zone": "v2-alpha-tpuv5-lite", "region": "v2-alpha-tpuv5"}


@pytest.mark.parametrize(("statuses", "end"), [("75 1 0", 0), ("1 2 0", 2), ("1 9 0", 9)])
def test_a_machine_starts_the_run_until_its_status_is_final(tmp_path, statuses, end):
    tools = {"docker": '[ "$1" = run ] || exit 0; read -r s rest < statuses; echo "$rest" > statuses; exit "$s"'}
    tools |= {"sudo": 'exec "$@"', "sleep": "", "gcloud": ""}
    for name, text in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "statuses").write_text(statuses)
    run = sky.task(job(target="sky", max_restarts=1))["run"]
    done = subprocess.run(
        ["bash", "-c", run], cwd=tmp_path, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, timeout=20
    )
    assert done.returncode == end


def test_a_dry_run_prints_the_task_and_runs_nothing(capsys, tmp_path, monkeypatch):
    flags = [f"--{name}={value}" for name, value in USUAL.items()]
    assert main([CONFIG, *flags, "--spot", "--dry_run", "--no_check"]) == 0
    text = capsys.readouterr().out
    assert "accelerators: tpu-v5p-128" in text and "nothing was submitted" in text
    assert "$ sky jobs launch --yes --detach-run runs/llama.sky.yaml" in text
    assert "stop: sky jobs cancel --name=llama --yes" in text


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("--topology=tpu7x:2x2x1", "tpu7x is on GKE alone"),
        ("--topology=v5p:4x8x8", "knows it as v5p-512, which has other shapes too"),
        ("--slices=2", "SkyPilot connects no slices"),
        ("--reservation=r", "~/.sky/config.yaml"),
        ("--image=registry/t5x_like:latest", "changes between restarts"),
        ("--workdir=runs/tiny", "is a path of one machine"),
        ("--zone=Mars", "--zone=Mars should be a zone such as us-east5-a, or a region"),
    ],
)
def test_bad_input_is_one_line(capsys, change, line):
    flags = [f"--{name}={value}" for name, value in USUAL.items()]
    assert main([CONFIG, *flags, "--dry_run", "--no_check", change]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
