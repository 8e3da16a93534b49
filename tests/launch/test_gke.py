"""JobSets as values: golden manifests, what follows from a slice, and agreement with xpk field by field."""

import dataclasses

import pytest
import yaml

from launch import gke, validate
from t5x_like.core.errors import UsageError
from tests.launch import jobs

GOLDEN = {
    "one_slice": {"topology": "v6e:4x4"},
    "two_slices_of_spot": {"slices": 2, "spot": True, "environment": {"LIBTPU_INIT_ARGS": "--xla_a=1 --xla_b=2"}},
    "reserved_for_a_queue": {
        "topology": "v5p:4x4x16",
        "reservation": "projects/other/reservations/chips",
        "queue": "multislice-queue",
        "priority": "high",
        "service_account": "trainer",
        "namespace": "team",
    },
}

# Where our manifest differs from xpk's, and why: path, ours, xpk's. Nothing else may differ.
DIFFERENCES = {
    "metadata.namespace": "said, so that a manifest means the same in every context",
    "metadata.labels": "a queue is named where the cluster has one; its workload label is for xpk's own list",
    "spec.failurePolicy.restartStrategy": "no process of the next start begins while one of the last still saves",
    "spec.failurePolicy.rules": "75 restarts without being counted, and 2 alone ends the set",
    "job.completionMode": "said, where JobSet's webhook has it by default",
    "job.podFailurePolicy.rules": "tells 2, 75 and machines that are taken away from faults, which are counted",
    "job.template.metadata": "labels of xpk's own list",
    "pod.schedulerName": "the default one, said by xpk",
    "pod.imagePullSecrets": "xpk leaves a secret named None behind",
    "pod.priorityClassName": "medium exists on xpk's clusters alone",
    "pod.volumes": "another name for the same memory",
    "container.volumeMounts": "another name for the same memory",
    "container.command": "no shell between SIGTERM and python",
    "container.env": "slices are told of each other, not left to what a cluster adds",
}


def alike(name):
    """The facts of our manifest and of xpk's, whose node pools of tpu7x have a placement policy of its naming."""
    job = jobs.alike(name)
    if job.slice.generation == "tpu7x":
        policy = f"{job.slice.name}-{job.slice.shape}-placement-policy"
        job = dataclasses.replace(job, gke=dataclasses.replace(job.gke, placement_policy=policy))
    return facts(gke.manifest(job)), facts(jobs.of_xpk(name))


def facts(document):
    """{path: value} of what can be compared; the parts that are nested deep have short names."""
    (replicated,) = document["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    parts = {
        "metadata": document["metadata"],
        "spec": {name: value for name, value in document["spec"].items() if name not in ("replicatedJobs",)},
        "replicated": {name: value for name, value in replicated.items() if name != "template"},
        "job": {name: value for name, value in job.items() if name != "template"},
        "job.template": {name: value for name, value in job["template"].items() if name != "spec"},
        "pod": {name: value for name, value in pod.items() if name != "containers"},
        "container": container,
    }
    found = {"apiVersion": document["apiVersion"], "kind": document["kind"]}
    for path, part in parts.items():
        for name, value in part.items():
            if name in ("failurePolicy", "podFailurePolicy"):
                found |= {f"{path}.{name}.{key}": inner for key, inner in value.items()}
            else:
                found[f"{path}.{name}"] = value
    return found


@pytest.mark.parametrize("name", jobs.ALIKE)
def test_values_are_those_of_xpk_but_for_what_is_said(name):
    ours, theirs = alike(name)
    differ = {path for path in ours.keys() | theirs.keys() if ours.get(path) != theirs.get(path)}
    assert differ - set(DIFFERENCES) == set()
    assert {"job.parallelism", "job.completions", "pod.nodeSelector", "container.resources"} <= ours.keys() - differ
    assert {"replicated.replicas", "pod.terminationGracePeriodSeconds", "pod.tolerations"} <= ours.keys() - differ
    assert {"spec.failurePolicy.maxRestarts", "spec.ttlSecondsAfterFinished"} <= ours.keys() - differ
    assert ours["metadata.annotations"] == theirs["metadata.annotations"]


def test_every_stated_difference_is_one():
    seen = set()
    for name in jobs.ALIKE:
        ours, theirs = alike(name)
        seen |= {path for path in ours.keys() | theirs.keys() if ours.get(path) != theirs.get(path)}
    assert seen == set(DIFFERENCES)


def test_spot_and_reservation_select_by_the_labels_that_xpk_selects_by():
    """What xpk's core/capacity.py gives for capacity types; its dry run prints none, for want of a cluster."""
    given = yaml.safe_load((jobs.GOLDEN / "xpk" / "capacity.yaml").read_text())
    for values, wanted in (({"spot": True}, given["SPOT"]), ({"reservation": "chips"}, given["RESERVATION"])):
        selector = facts(gke.manifest(jobs.job(**values)))["pod.nodeSelector"]
        assert wanted.items() <= selector.items()


@pytest.mark.parametrize("name", GOLDEN)
def test_a_whole_manifest_is_the_golden_one(name):
    job = jobs.job("--config.optim.learning_rate=1e-3", **GOLDEN[name])
    (step,) = gke.submission(job, gke.manifest(job), ()).steps
    path = jobs.GOLDEN / f"gke_{name}.yaml"
    if jobs.UPDATE:
        path.write_text(step.document)
    assert step.document == path.read_text()
    assert yaml.safe_load(step.document) == gke.manifest(job)
    assert validate.problems(gke.manifest(job)) == []


def test_the_environment_of_several_slices_says_which_is_which():
    container = facts(gke.manifest(jobs.job(slices=3)))["container.env"]
    given = {entry["name"]: entry for entry in container}
    assert given["MEGASCALE_NUM_SLICES"]["value"] == "3"
    assert given["MEGASCALE_COORDINATOR_ADDRESS"]["value"] == "llama-slice-job-0-0.llama"
    label = given["MEGASCALE_SLICE_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert label == "metadata.labels['jobset.sigs.k8s.io/job-index']"
    assert "MEGASCALE_NUM_SLICES" not in {each["name"] for each in facts(gke.manifest(jobs.job()))["container.env"]}


def test_kubernetes_replaces_nothing_in_commands_and_values():
    job = jobs.job("--config.data.source=jsonl:a$(HOME)/$$", environment={"A": "$(B)$"})
    container = facts(gke.manifest(job))
    assert "--config.data.source=jsonl:a$$(HOME)/$$$$" in container["container.command"]
    assert {"name": "A", "value": "$$(B)$$"} in container["container.env"]


def test_a_variable_is_named_once():
    for slices in (1, 2):
        document = gke.manifest(jobs.job(slices=slices, environment={"PYTHONUNBUFFERED": "0"}))
        assert facts(document)["container.env"][0] == {"name": "PYTHONUNBUFFERED", "value": "0"}
        assert validate.problems(document) == []


def test_a_place_without_a_cluster_is_said_to_be_of_no_use():
    job = jobs.job(zone="us-east5-a")
    assert "--zone=us-east5-a not used: without --cluster" in gke.submission(job, gke.manifest(job), ()).about[-1]


def test_a_service_account_and_the_network_of_the_host_exclude_each_other():
    own = facts(gke.manifest(jobs.job(service_account="trainer")))
    assert own["pod.serviceAccountName"] == "trainer" and "pod.hostNetwork" not in own and "pod.dnsPolicy" not in own
    assert facts(gke.manifest(jobs.job()))["pod.hostNetwork"] is True


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"image": ""}, "--image is missing"),
        ({"image": "a/b"}, "--image=a/b has no tag"),
        ({"image": "host:5000/a/b"}, "has no tag"),
        ({"image": "a/b:latest"}, "`latest` means changes between restarts"),
        ({"workdir": "runs/llama"}, "--workdir=runs/llama is a path of one machine"),
        ({"workdir": "gs://bucket", "name": "a"}, "--workdir=gs://bucket names no folder of a bucket"),
        ({"workdir": "gs://Bucket/llama"}, "names no folder of a bucket"),
        ({"topology": ""}, "--topology is missing"),
        ({"topology": "v5p:1x1x1"}, "the smallest slice to be had is v5p:2x2x1"),
        ({"topology": "v6e:2x2", "slices": 2}, "slices that work together have several machines each"),
        ({"cluster": "c"}, "--cluster=c needs --project and --zone"),
        ({"reservation": "A_b"}, "--reservation=A_b should be NAME or projects/PROJECT/reservations/NAME"),
    ],
)
def test_a_job_that_cannot_run_there_is_one_line(values, says):
    with pytest.raises(UsageError) as error:
        job = jobs.job(**values)
        gke.check(job)
        gke.manifest(job)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_config_outside_of_the_checkout_is_not_in_the_image(tmp_path):
    job = jobs.job()
    for path in (str(tmp_path / "mine.py"), "../mine.py", "~/mine.py"):
        with pytest.raises(UsageError, match="outside of the checkout, and so not in the image"):
            gke.check(dataclasses.replace(job, config=(f"--config={path}",)))
    for path in ("runs/mine.py", "./tests/mine.py", "configs/../runs/mine.py"):
        with pytest.raises(UsageError, match="is not in the image, which has no (runs|tests)/"):
            gke.check(dataclasses.replace(job, config=(f"--config={path}",)))
    gke.check(dataclasses.replace(job, config=("--config=tiny",)))
    gke.check(dataclasses.replace(job, config=("--config=tests",)))


def test_a_name_that_is_too_long_with_its_suffixes_says_by_how_much():
    long = "a" * 43
    with pytest.raises(UsageError) as error:
        validate.require(gke.manifest(jobs.job(name=long, slices=2)))
    assert f"{long}-slice-job-1-15-abcde, of 64 characters" in str(error.value)
    assert "shorten the name by 1, to 42 or less" in str(error.value)
    validate.require(gke.manifest(jobs.job(name=long[1:], slices=2)))


def test_the_dry_run_prints_document_and_commands_and_runs_nothing(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    flags = [f"--{name}={value}" for name, value in (jobs.USUAL | jobs.CLUSTER).items()]
    assert gke.main([jobs.CONFIG, "--config.loop.steps=7", *flags, "--dry_run", "--no_check"]) == 0
    out = capsys.readouterr().out
    text = out.partition("\n")[2].partition("\n$ ")[0]
    container = facts(yaml.safe_load(text))["container.command"]
    assert container[:4] == ["python", "-m", "t5x_like", "train"] and "--config.loop.steps=7" in container
    context = "kubectl --context=gke_project_us-east5-a_cluster --namespace=default"
    assert f"$ {context} create --filename=- < the document above" in out
    assert f"# stop and delete; all save: {context} delete jobset llama" in out
    assert "nothing was submitted" in out
