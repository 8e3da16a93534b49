"""What is wrong or remarkable about a run on devices that are not there: one finding each, with what to do."""

import json
import pathlib

import jax
import pytest

from t5x_like.__main__ import main
from t5x_like.core import accelerators
from t5x_like.parallel import mesh as meshes
from t5x_like.runs import doctor
from t5x_like.runs import program as programs
from t5x_like.runs.arguments import load_config
from t5x_like.runs.doctor import Target
from t5x_like.runs.findings import Place
from t5x_like.runs.planned import experiment_of

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = f"--config={ROOT / 'configs/pretrain/test.py'}"


def target(devices=4, **changed):
    known = {"platform": "tpu", "kind": "TPU v5", "place": Place(1, 2**40)}
    return Target(devices, **{**known, **changed})


def examined(*overrides, config=TINY, on=None):
    given = [f"--config.{override}" for override in overrides]
    return doctor.examine(*load_config([config, *given]), on or target())


# A model whose dims fill a TPU, with rows enough: nothing about it is remarkable there.
SOUND = (
    "model.width=256",
    "model.decoder.head_size=128",
    "model.decoder.mlp=512",
    "model.max_length=2048",
    "data.length=2048",
)


def found(report, level):
    return {(each.path, f"{each.what}; {each.remedy}") for each in report.findings if each.level == level}


def test_a_sound_run_has_notes_alone():
    report = examined(*SOUND, on=target(hbm_bytes=2**35))
    assert (found(report, "error"), found(report, "warning")) == (set(), set())
    paths = {path for path, _ in found(report, "note")}
    assert {"attention", "config.data.batch_size", "config.checkpoint", "memory"} <= paths
    assert ("attention", "decoder: splash, the TPU's flash attention kernel; ") in found(report, "note")
    assert report.mesh["fsdp"] == 4
    assert report.footprint is not None and report.footprint.parameters > 0


# Overrides of one run: the warnings that they bring, by path.
WARNINGS = {
    (
        "data.length=1408",
        "model.decoder.mlp=64",
        "model.dtype.params=bfloat16",
        "mesh.rules=mlp=",
        "mesh.pipeline.repeats=2",
        "optim.schedule.warmup_steps=40",
    ): {
        "config.data.length": "1408 tokens of a row on a device are attended to in blocks of 128; use a multiple",
        "config.model.decoder.mlp": "64 columns on a device fill 50% of tiles of 128; use a multiple of 128 a device",
        "config.model.dtype.params": "weights are trained in bfloat16: updates below a 256th of a weight are lost",
        "config.mesh.rules": "'mlp=' changes nothing on this mesh, whose axes of more than one device are fsdp; remove",
        "config.mesh.pipeline": "repeats=2 changes nothing on a mesh without stages; set config.mesh.stage, or remove",
        "config.optim.schedule.warmup_steps": "40 steps of warm-up, and the run ends after 40",
    },
    ("data.length=1000", "loop.micro_batches=2", "model.dtype.compute=float32", "model.remat=q:0.2"): {
        "attention": "runs without a flash attention kernel (no splash: length 1000 is no multiple of 128",
        "config.data.batch_size": "1 rows of a micro-batch on a device, 1,000 tokens; 2 micro-batches",
        "config.model.dtype.compute": "set it to auto or bfloat16",
        "config.model.remat": "q:0.2 is of none of the 2 layers of the decoder; shares are of whole periods",
    },
    ('runtime.compiler_options.tpu["xla_gpu_autotune_level"]=4',): {
        "config.runtime.compiler_options.tpu": "which that for tpu takes without effect; move it to"
    },
    ("model.vocab_size=300000", "mesh.rules=embed="): {"config.mesh.rules": "alike: embed/tokens (293 MiB over fsdp)"},
    ("model.vocab_multiple=4", "mesh.tensor=2", "mesh.fsdp=2"): {
        "config.model.vocab_multiple": "a device has 130 columns of the vocabulary, no multiple of 128; set it to 256"
    },
}


@pytest.mark.parametrize(("overrides", "told"), WARNINGS.items(), ids=[each[0] for each in WARNINGS])
def test_what_costs_is_a_warning_with_a_remedy(overrides, told):
    changed = {each.split("=")[0] for each in overrides}
    report = examined(*(each for each in SOUND if each.split("=")[0] not in changed), *overrides)
    warned = dict(found(report, "warning"))
    assert found(report, "error") == set()
    assert warned.keys() == told.keys()
    for path, says in told.items():
        assert says in warned[path]


ERRORS = [
    (("data.batch_size=6",), "config.data.batch_size", "is not divisible by the 4 data shards (fsdp=4); use 4 or 8"),
    (("mesh.fsdp=3",), "config.mesh", "= 3, but there are 4 devices; set one axis to -1"),
    (("mesh.tensor=4", "mesh.fsdp=1", "model.decoder.mlp=66"), "config", "dim 'mlp' of size 66 is not divisible"),
    (("model.family=lama",), "config.model.family", "config.model.family='lama' is unknown; did you mean 'llama'"),
    (
        ('runtime.compiler_options.cpu["xla_tpu_scoped_vmem_limit_kib"]=4',),
        "config.runtime.compiler_options.cpu",
        "which that for cpu refuses; move it to config.runtime.compiler_options.tpu",
    ),
    (("loop.steps=80", "optim.schedule.steps=40", "optim.schedule.name=linear"), "config.loop.steps", "goes past"),
]


@pytest.mark.parametrize(("overrides", "path", "says"), ERRORS, ids=[each[0][0] for each in ERRORS])
def test_what_stops_a_run_is_an_error(overrides, path, says):
    report = examined(*overrides)
    assert [text for where, text in found(report, "error") if where == path and says in text], report.findings
    assert report.errors >= 1 and report.findings[0].level == "error"


def test_a_mesh_must_name_the_slices():
    [fault] = found(examined(on=target(8, slices=2)), "error")
    assert fault[0] == "config.mesh.slice" and "set config.mesh.slice=2" in fault[1]
    assert found(examined("mesh.slice=2", on=target(8, slices=2)), "error") == set()


def test_faults_that_do_not_hide_each_other_are_all_told():
    report = examined("data.batch_size=6", "mesh.tensor=4", "mesh.fsdp=1", "model.decoder.mlp=66", "data.length=33")
    assert report.errors == 1  # 6 rows do on one data shard
    both = examined("data.batch_size=6", "mesh.tensor=2", "mesh.fsdp=2", "model.decoder.mlp=65", "loop.micro_batches=2")
    assert {path for path, _ in found(both, "error")} == {"config.data.batch_size", "config"}


def test_names_that_nothing_has_and_replication_over_data_are_told():
    plain = ("model.decoder.gated=False", "model.remat=minimal", "mesh.preset=data", "mesh.data=4")
    notes = found(examined(*SOUND, *plain), "note")
    said = ("config.model.remat", "'minimal' saves mlp_gate too, which no activation of this program is called; ")
    assert said in notes
    assert any("the whole state" in text and "replicated over data=4" in text for _, text in notes)
    warned = found(examined(*SOUND, "model.decoder.gated=False", "model.remat=mlp_gate@host"), "warning")
    assert any(
        "'mlp_gate@host' saves mlp_gate, and no activation of this program has such a name" in t for _, t in warned
    )


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ("data.length=1024", "model.attention_block=256"),
            "attended to in blocks of 256; blocks below 512 take longer",
        ),
        (("data.length=1536", "model.attention_block=1024"), "attended to in blocks of 512: 1024 does not divide them"),
        (("data.length=1024", "model.attention_block=1024"), ""),
    ],
)
def test_blocks_of_attention_that_are_smaller_than_asked_or_than_is_fast_are_told(overrides, says):
    report = examined(*(each for each in SOUND if not each.startswith("data.length")), *overrides)
    told = [line for path, line in found(report, "note") if path == "config.model.attention_block"]
    assert bool(told) == bool(says) and all(says in line for line in told)


def test_kv_heads_that_are_replicated_are_told():
    heads = examined(*SOUND, "mesh.preset=fsdp_tensor", "mesh.tensor=4", "mesh.fsdp=1")
    assert any("2 kv heads do not divide over the 4 shards" in text for _, text in found(heads, "note"))


def test_memory_of_devices_and_hosts_is_set_beside_what_there_is():
    small = examined(*SOUND, on=target(hbm_bytes=2**20, place=Place(1, 2**20)))
    paths = {path for path, _ in found(small, "warning")}
    assert {"memory", "config.checkpoint"} <= paths


@pytest.mark.parametrize("overrides", [("mesh.preset=data", "mesh.data=4"), ("checkpoint.asynchronous=False",)])
def test_a_checkpoint_copies_every_part_of_the_state_once_to_the_host(overrides):
    """However often a device holds it too, and whether or not the run waits for its end."""

    def said(*given):
        return dict(found(examined(*SOUND, *given), "note"))["config.checkpoint"]

    assert said(*overrides) == said()
    small = examined(*SOUND, *overrides, on=target(place=Place(1, 2**20)))
    assert dict(found(small, "warning"))["config.checkpoint"].endswith("; use more chips")


def test_the_command_says_it_and_ends_with_2_at_errors_alone(capsys, tmp_path):
    path = tmp_path / "check.json"
    config = f"--config={ROOT / 'configs/pretrain/llama3_8b.py'}"
    assert main(["plan", "--check", config, "--topology=v5p:4x4x4", f"--json={path}"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("on v5p:4x4x4, mesh fsdp=64: 0 errors, 0 warnings")
    content = json.loads(path.read_text())
    assert content["errors"] == 0 and content["memory"]["parameters"] > 4e8
    assert {"level", "path", "what", "remedy"} == content["findings"][0].keys()
    assert main(["plan", "--check", config, "--topology=v5p:4x4x4", "--config.data.batch_size=100"]) == 2
    assert "error    config.data.batch_size: config.data.batch_size=100 is not" in capsys.readouterr().out


def test_a_run_of_reinforcement_learning_and_one_on_cpus_are_looked_at(capsys):
    assert main(["plan", "--check", f"--config={ROOT / 'configs/rl/test.py'}"]) == 0
    assert capsys.readouterr().out.startswith("on CPU, mesh one device: 0 errors, ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--topology=v9:2x2"], "v9"),
        (["--slices=2"], "--slices=2 should be at least 1, and needs --topology"),
        (["--check=yes"], "--check"),
        (["--config.model.widht=3"], "config.model.widht is unknown"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, says):
    assert main(["plan", "--check", TINY, *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_every_generation_has_a_kind_and_hosts_with_memory():
    import re

    for name, row in accelerators.GENERATIONS.items():
        assert re.fullmatch(row.kind, accelerators.device_kind(name)), name
        assert all(accelerators.host_bytes(each) > 2**30 for each in accelerators.slices(name) if each.chips > 1)


def test_a_run_that_starts_is_told_what_should_not_be_overlooked():
    experiment = experiment_of(
        *load_config([TINY, "--config.optim.schedule.warmup_steps=40", "--config.mesh.rules=mlp="])
    )
    mesh = meshes.make(experiment.mesh)
    with jax.set_mesh(mesh):
        lines = doctor.at_start(experiment, programs.step_program(experiment, mesh), hosts=1)
    assert [line.split(":")[0] for line in lines] == ["config.mesh.rules", "config.optim.schedule.warmup_steps"]
    assert lines[1].endswith("the run ends after 40; use fewer, or more config.loop.steps")
