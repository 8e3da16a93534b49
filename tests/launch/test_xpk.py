"""The command line of xpk, and the table of accelerators beside xpk's own."""

import pytest
import yaml

from launch import validate, xpk
from t5x_like.core import accelerators
from t5x_like.core.errors import UsageError
from tests.launch import jobs


def test_every_slice_has_the_names_machines_and_labels_that_xpk_gives_it():
    """tests/golden/launch/xpk/slices.yaml: all TPUs of its core/system_characteristics.py."""
    given = yaml.safe_load((jobs.GOLDEN / "xpk" / "slices.yaml").read_text())
    seen = set()
    for label, machines in given.items():
        (generation,) = [name for name, row in accelerators.GENERATIONS.items() if row.gke == label]
        for machine, types in machines.items():
            for name, shapes in types.items():
                for shape, vms, chips in (entry.split() for entry in shapes):
                    found = accelerators.parse(f"{generation}:{shape}")
                    seen.add(found.spelled)
                    assert (found.name, found.machine) == (name, machine), found.spelled
                    assert (found.vms, found.vm_chips) == (int(vms), int(chips)), found.spelled
    ours = {each.spelled for generation in accelerators.GENERATIONS for each in accelerators.slices(generation)}
    # Single machines that a TPU VM can be and xpk does not make, and chips that can only be planned for.
    assert ours - seen == {"v5e:1x1", "v5e:2x2", "v4:1x1x1", "v5p:1x1x1"}
    assert len(seen) > 1500


def test_the_command_line_is_whole():
    command = xpk.create(jobs.alike("v5p_four_long_slices"))
    assert command[:3] == ("xpk", "workload", "create")
    assert {"--tpu-type=v5p-4x4x16", "--num-slices=4", "--priority=high", "--workload=llama"} <= set(command)
    assert {"--restart-on-exit-codes=1,75", "--termination-grace-period-seconds=60"} <= set(command)
    assert command[-1].startswith("--command=exec python -m t5x_like train --config=configs/pretrain/tiny.py")
    spot = xpk.create(jobs.job(target="xpk", spot=True, **jobs.CLUSTER))
    assert "--spot" in spot and "--spot" not in command


@pytest.mark.parametrize("name", jobs.ALIKE)
def test_xpk_restarts_what_is_preempted_and_ends_wrong_use(name):
    (rule,) = jobs.of_xpk(name)["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    statuses = rule["onExitCodes"]
    assert (rule["action"], statuses["operator"]) == ("FailJob", "NotIn")
    assert {1, 75, 137, 143} <= set(statuses["values"]) and 2 not in statuses["values"]


@pytest.mark.parametrize("name", jobs.ALIKE)
def test_all_that_our_checks_find_in_a_manifest_of_xpk_is_the_secret_it_leaves_behind(name):
    (line,) = validate.problems(jobs.of_xpk(name))
    assert "imagePullSecrets names 'None'" in line


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"cluster": ""}, "--cluster is missing"),
        ({"name": "a" * 41}, "has 41 characters, and xpk takes at most 40"),
        ({"priority": "urgent"}, "--priority=urgent is none of xpk's"),
        ({"queue": "mine"}, "--queue=mine: xpk chooses it"),
        ({"environment": {"A": 'say "x"'}}, "xpk takes no value with quotation marks"),
        ({"environment": {"A": "a\\b"}}, "xpk takes no value with quotation marks, backslashes"),
        ({"environment": {"A": "a\nb"}}, "--environment=A='a\\nb': xpk takes no value"),
    ],
)
def test_what_xpk_cannot_do_is_one_line(values, says):
    with pytest.raises(UsageError) as error:
        xpk.check(jobs.job(target="xpk", **(jobs.CLUSTER | values)))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_kubernetes_replaces_nothing_and_yaml_is_left_whole():
    job = jobs.job("--config.data.source=jsonl:$(A)", target="xpk", environment={"A": "$$"}, **jobs.CLUSTER)
    command = xpk.create(job)
    assert "--env=A=$$$$" in command and "'--config.data.source=jsonl:$$(A)'" in command[-1]
    with pytest.raises(UsageError, match="xpk takes no argument with a line break"):
        xpk.check(jobs.job("--config.data.source=jsonl:a\nb", target="xpk", **jobs.CLUSTER))


def test_a_name_that_xpk_takes_may_be_too_long_for_a_pod(capsys):
    given = jobs.USUAL | jobs.CLUSTER | {"name": "a" * 40, "topology": "v5p:16x20x28", "slices": "20"}
    flags = [f"--{name}={value}" for name, value in given.items()]
    assert xpk.main([jobs.CONFIG, *flags, "--dry_run", "--no_check"]) == 2
    assert "-slice-job-19-2239-abcde, of 64 characters, and 63 is the most" in capsys.readouterr().err


def test_the_dry_run_prints_the_commands_and_runs_nothing(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    flags = [f"--{name}={value}" for name, value in (jobs.USUAL | jobs.CLUSTER).items()]
    assert xpk.main([jobs.CONFIG, *flags, "--dry_run", "--no_check"]) == 0
    out = capsys.readouterr().out
    assert "$ xpk workload create --workload=llama --cluster=cluster" in out
    assert "# stop and delete; all save: xpk workload delete --workload=llama --cluster=cluster" in out
