"""Checks of manifests: each fault that a cluster would meet late, or never name, is one line here."""

import copy
import re

import pytest
import yaml

from launch import gke, validate
from launch.validate import __main__ as command
from launch.validate import semantics
from tests.launch import jobs

needs_schemas = pytest.mark.skipif(not validate.has_schemas(), reason="kubernetes-validate is not installed")

JOB = "spec.replicatedJobs.0.template.spec"
POD = f"{JOB}.template.spec"
SELECTOR = f"{POD}.nodeSelector"
CONTAINER = f"{POD}.containers.0"
RULE = "spec.failurePolicy.rules.0"
SPOT = "cloud.google.com/gke-spot"
DELETE = object()


def changed(path, value, *, base=None):
    """A sound manifest with one place changed; names with dots stand in brackets: nodeSelector[a.b/c]."""
    document = copy.deepcopy(gke.manifest(jobs.job(slices=2)) if base is None else base)
    *parents, last = [inner or outer for inner, outer in re.findall(r"\[([^]]+)\]|([^.\[]+)", path)]
    place = document
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place[name]
    key = int(last) if isinstance(place, list) else last
    if value is DELETE:
        del place[key]
    else:
        place[key] = value
    return document


SEMANTIC = [
    ("metadata.name", "1llama", "metadata.name=1llama should be of a-z, 0-9 and -"),
    ("metadata.name", "a" * 50, "of 71 characters, and 63 is the most; shorten the name by 8, to 42 or less"),
    (f"{JOB}.parallelism", 8, "parallelism=8 x 4 chips is not 4x4x4, which has 64; set parallelism to 16"),
    (f"{JOB}.completions", DELETE, "completions=None x 4 chips is not 4x4x4"),
    (f"{JOB}.completionMode", "NonIndexed", "completionMode=NonIndexed should be Indexed"),
    (f"{SELECTOR}[cloud.google.com/gke-tpu-topology]", "3x3x3", "3x3x3 is no slice of v5p"),
    (f"{SELECTOR}[cloud.google.com/gke-tpu-topology]", "4x4", "4x4 is no slice of v5p"),
    (f"{SELECTOR}[cloud.google.com/gke-tpu-topology]", "2x2x4", "16 x 4 chips is not 2x2x4, which has 16; set paral"),
    (f"{SELECTOR}[cloud.google.com/gke-tpu-topology]", DELETE, "belong together; give both"),
    (f"{SELECTOR}[cloud.google.com/gke-tpu-accelerator]", "tpu-v5p", "=tpu-v5p is no TPU; there are tpu-v4-podslice"),
    (f"{SELECTOR}[cloud.google.com/gke-tpu-accelerator]", "tpu-v6e-slice", "v6e:4x4x4 is no slice of v6e"),
    (f"{SELECTOR}[node.kubernetes.io/instance-type]", "ct5p-hightpu-1t", "of 4x4x4; set ct5p-hightpu-4t"),
    (SELECTOR, {}, "is asked for without nodeSelector"),
    (f"{CONTAINER}.resources.limits[google.com/tpu]", "four chips", "'four chips' should be a whole number of chips"),
    (f"{CONTAINER}.resources.limits[google.com/tpu]", 8, "google.com/tpu is 8, but a machine of tpu-v5p-slice"),
    (f"{CONTAINER}.resources", {}, "no container asks for google.com/tpu"),
    (f"{POD}.tolerations", [], "tolerations has none for google.com/tpu"),
    (f"{SELECTOR}[{SPOT}]", "true", "asks for spot machines and tolerations has none"),
    (f"{SELECTOR}[{SPOT}]", "yes", "gke-spot='yes' should be 'true'"),
    (f"{POD}.restartPolicy", "OnFailure", "restartPolicy=OnFailure, with which podFailurePolicy is refused"),
    (f"{POD}.restartPolicy", DELETE, "restartPolicy is missing, and JobSet makes it OnFailure"),
    (f"{JOB}.podFailurePolicy.rules.0.onExitCodes.containerName", "main", "there is no container main"),
    (f"{JOB}.podFailurePolicy.rules.0.onExitCodes.values", [0, 2], "exit status 0 is no failure"),
    (f"{JOB}.podFailurePolicy.rules.0.action", "FailIndex", "FailIndex needs backoffLimitPerIndex"),
    (f"{CONTAINER}.image", "a/b", "image=a/b has no tag"),
    (f"{CONTAINER}.env.0.name", "MEGASCALE_NUM_SLICES", "has MEGASCALE_NUM_SLICES twice"),
    (f"{CONTAINER}.env.1.value", "3", "MEGASCALE_NUM_SLICES=3, but there are 2"),
    (f"{CONTAINER}.env.3.value", "other-0-0.llama", "is not the first pod's; set llama-slice-job-0-0.llama"),
    (f"{POD}.imagePullSecrets", [{"name": "None"}], "imagePullSecrets names 'None'"),
    (f"{RULE}.name", "pre-empted", "name=pre-empted should be of letters, digits and _ , :"),
    (f"{RULE}.name", "wrong_use", "is the name of another rule"),
    (f"{RULE}.onJobFailureReasons", ["PodFailed"], "PodFailed is none; there are BackoffLimitExceeded"),
    (f"{RULE}.onJobFailureMessagePatterns", ["("], "'(' is no regular expression"),
    (f"{RULE}.targetReplicatedJobs", ["workers"], "there is no workers; there are slice-job"),
    ("spec.successPolicy", {"operator": "All", "targetReplicatedJobs": ["x"]}, "successPolicy.targetReplicatedJobs"),
    ("spec.replicatedJobs.0.dependsOn", [{"name": "data", "status": "Ready"}], "data does not stand before slice-job"),
    ("spec.coordinator", {"replicatedJob": "x"}, "coordinator.replicatedJob=x is none of the replicated jobs"),
    ("spec.coordinator", {"replicatedJob": "slice-job", "podIndex": 16}, "beyond the last job or pod"),
    ("spec.replicatedJobs.0.replicas", 2**40, "MEGASCALE_NUM_SLICES=2, but"),
    (f"{JOB}.backoffLimit", 2**40, "backoffLimit=1099511627776 should be between 0 and 2147483647"),
    (f"{CONTAINER}.resources.limits[google.com/tpu]", "\u00b2", "'\u00b2' should be a whole number of chips"),
    (f"{CONTAINER}.resources.limits[google.com/tpu]", "9" * 5000, "should be a whole number of chips"),
    (
        f"{CONTAINER}.resources.requests",
        {"google.com/tpu": 2},
        "has the limit 4 and the request 2, which must be equal",
    ),
    (f"{POD}.containers", [], "containers is empty; give the one that runs the program"),
    (f"{CONTAINER}.image", "A B:1", "'A B' names no image"),
    (f"{POD}.tolerations.0", {"key": "google.com/tpu", "value": "absent"}, "tolerations has none for google.com/tpu"),
    (f"{POD}.tolerations.0", {"key": "google.com/tpu", "effect": "NoExecute", "operator": "Exists"}, "has none for"),
    (f"{POD}.tolerations.0", {"operator": "Equal", "value": "present"}, "tolerations has none for google.com/tpu"),
    (f"{SELECTOR}[cloud.google.com/reservation-name]", "a b", "reservation-name=a b is no value of a label"),
    (f"{CONTAINER}.env.2", {"name": "MEGASCALE_SLICE_ID", "value": "0"}, "MEGASCALE_SLICE_ID=0 on all slices"),
    (f"{CONTAINER}.env.2", {"name": "A", "value": "0"}, "has MEGASCALE_NUM_SLICES without MEGASCALE_SLICE_ID; give"),
    (f"{RULE}.onJobFailureMessagePatterns", ["(?=x)y"], "'(?=x)y' is no regular expression: RE2 has no (?="),
    (f"{RULE}.onJobFailureMessagePatterns", [r"(a)\1"], r"RE2 has no \1"),
    ("spec.failurePolicy.restartStrategy", "InPlaceRestart", "backoffLimit=0: InPlaceRestart needs 2147483647"),
    ("spec.network", {"enableDNSHostnames": False}, "enableDNSHostnames=False, but llama-slice-job-0-0.llama is to be"),
    ("metadata.namespace", "Bad Ns", "metadata.namespace=Bad Ns should be of a-z, 0-9 and -"),
    ("metadata.labels", {"kueue.x-k8s.io/queue-name": ""}, "names no queue; give its name or leave the label out"),
    ("metadata.annotations", {}, "no alpha.jobset.sigs.k8s.io/exclusive-topology, so pods of 2 slices may mix"),
    ("spec.network", {"subdomain": "A"}, "spec.network.subdomain=A should be a name"),
]


@pytest.mark.parametrize(("path", "value", "says"), SEMANTIC, ids=[f"{path}-{says[:16]}" for path, _, says in SEMANTIC])
def test_what_no_schema_says_is_one_line(path, value, says):
    document = changed(path, value)
    found = semantics.problems(document)
    assert any(says in line for line in found), found
    assert all("\n" not in line for line in found)


def test_what_is_sound_is_let_pass():
    for path, value in (
        (f"{POD}.tolerations.0", {"key": "google.com/tpu", "value": "present", "effect": "NoSchedule"}),
        (f"{POD}.tolerations.0", {"operator": "Exists"}),
        (f"{CONTAINER}.resources.requests", {"google.com/tpu": "4"}),
        (f"{CONTAINER}.env", []),  # as xpk leaves it: the cluster says them
        (f"{RULE}.onJobFailureMessagePatterns", [r"[(?=]\(?=a\\d+ (?i:b)", "a+?"]),
        ("spec.replicatedJobs.0.template.metadata", {"annotations": {"a": "b"}}),
        ("metadata.namespace", "1-team"),
    ):
        assert semantics.problems(changed(path, value)) == [], path


SCHEMA = [
    ("spec.replicatedJobs.0.replicas", 2**40, "1099511627776 is greater than the maximum of 2147483647"),
    ("spec.failurePolicy.maxRestart", 3, "'maxRestart' was unexpected"),
    ("spec.replicatedJobs.0.replica", 3, "'replica' was unexpected"),
    ("spec.failurePolicy.maxRestarts", "3", "'3' is not of type 'integer'"),
    (f"{RULE}.action", "Restart", "'Restart' is not one of ['FailJobSet'"),
    ("spec.replicatedJobs.0.dependsOn", [{"name": "data", "status": "Running"}], "'Running' is not one of"),
    ("spec.ttlSecondsAfterFinished", -1, "-1 is less than the minimum"),
    ("apiVersion", "jobset.x-k8s.io/v1", "'jobset.x-k8s.io/v1alpha2' was expected"),
    (f"{JOB}.backofLimit", 0, "'backofLimit' was unexpected"),
    (f"{POD}.terminationGracePeriod", 30, "'terminationGracePeriod' was unexpected"),
    (f"{CONTAINER}.env.0.valu", "1", "'valu' was unexpected"),
]


@needs_schemas
@pytest.mark.parametrize(("path", "value", "says"), SCHEMA)
def test_what_a_schema_says_is_one_line_with_its_path(path, value, says):
    found = validate.problems(changed(path, value))
    assert len(found) == 1 and says in found[0] and "\n" not in found[0]
    if path != "apiVersion":
        assert found[0].startswith("spec.")


@needs_schemas
def test_a_schema_alone_lets_pass_what_the_semantic_checks_find():
    """Why there are two: Kubernetes' schema takes both of these."""
    for path, value in (
        (f"{POD}.restartPolicy", "OnFailure"),
        (f"{CONTAINER}.resources.limits[google.com/tpu]", "four"),
    ):
        document = changed(path, value)
        assert list(validate._schemas(document)) == [] and semantics.problems(document) != []


@needs_schemas
@pytest.mark.parametrize("topology", ["v4:4x4x4", "v5e:16x16", "v5p:4x4x8", "v6e:1x1", "v6e:4x8", "tpu7x:4x4x4"])
@pytest.mark.parametrize("spot", [True, False])
def test_what_is_made_of_any_generation_passes(topology, spot):
    slices = 1 if topology.endswith(":1x1") else 2
    assert validate.problems(gke.manifest(jobs.job(topology=topology, spot=spot, slices=slices))) == []


def test_several_replicas_of_one_machine_are_refused():
    base = gke.manifest(jobs.job(topology="v6e:2x2"))
    (line,) = semantics.problems(changed("spec.replicatedJobs.0.replicas", 2, base=base))
    assert "slices that work together have several machines; 2x2 has one" in line


def test_the_command_names_files_and_ends_with_2(tmp_path, capsys):
    good, bad, broken = (tmp_path / name for name in ("good.yaml", "bad.yaml", "broken.yaml"))
    good.write_text(yaml.safe_dump(gke.manifest(jobs.job())))
    bad.write_text(yaml.safe_dump(changed(f"{JOB}.parallelism", 8)))
    broken.write_text("a: [")
    empty = tmp_path / "empty.yaml"
    empty.write_text("---\n")
    assert command.main([str(empty)]) == 2
    assert capsys.readouterr().err == f"{empty}: there is no document in it\n"
    assert command.main([str(good)]) == 0
    assert "JobSet llama is sound" in capsys.readouterr().out
    assert command.main([str(good), str(bad), str(broken), str(tmp_path / "none.yaml")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert f"{bad}: spec.replicatedJobs[0].template.spec.parallelism=8 x 4 chips is not 4x4x4" in lines[0]
    assert lines[1].startswith(f"{broken}: ") and "No such file" in lines[2]


def test_without_the_schemas_the_rest_is_checked_and_the_gap_is_said(monkeypatch):
    monkeypatch.setattr(validate, "has_schemas", lambda: False)
    assert validate.require(gke.manifest(jobs.job())) == (
        "schemas of Kubernetes were not looked at: pip install 't5x_like[launch]'",
    )
    assert validate.problems(changed(f"{JOB}.parallelism", 8)) != []
    (line,) = validate.problems({"kind": "List"})
    assert "no JobSet as it should be" in line
