"""A run in pipeline stages: it is resumed to the bit, and its checkpoints are read without stages and the other way."""

import jax
import pytest

from tests.end_to_end.commands import rows, train, unfinished, values

T5 = "configs/pretrain/t5_tiny.py"
STAGES = (
    "--config.mesh.stage=2",
    "--config.mesh.fsdp=2",
    "--config.mesh.tensor=2",
    "--config.mesh.pipeline.micro_batches=4",
)


def test_stages_come_and_go_between_starts_and_a_resume_in_stages_is_exact(finished, tmp_path, capsys):
    losses = {row["step"]: row["train/loss"] for row in rows(finished) if "train/loss" in row}
    workdir = unfinished(finished, tmp_path / "staged")
    assert train(workdir, *STAGES, config=None) == 0  # a checkpoint of 8 FSDP shards, read by stages
    shown = " ".join(capsys.readouterr().out.split())
    assert "fsdp=8 (8 cpu devices) -> fsdp=2 x stage=2 x tensor=2" in shown
    assert "4 micro-batches through 2 stages: 5 turns, a stage is idle in 1 of them (bubble 20.0%)" in shown
    staged = {row["step"]: row["train/loss"] for row in rows(workdir) if "train/loss" in row}
    assert [staged[step] for step in (11, 12)] == pytest.approx([losses[step] for step in (11, 12)], rel=1e-5)

    longer = ("--config.loop.steps=16", "--config.optim.schedule.steps=16", "--config.checkpoint.every_steps=14")
    assert train(workdir, *STAGES, *longer, config=None) == 0
    again = unfinished(workdir, tmp_path / "again", last=16)
    assert train(again, *STAGES, *longer, config=None) == 0
    assert values(again) == values(workdir) and values(workdir)[-1][0] == 16

    back = unfinished(workdir, tmp_path / "back", last=16)
    assert train(back, "--config.mesh.stage=1", "--config.mesh.fsdp=4", *longer, config=None) == 0
    one, other = (
        {row["step"]: row["train/loss"] for row in rows(each) if "train/loss" in row} for each in (workdir, back)
    )
    assert [other[step] for step in (15, 16)] == pytest.approx([one[step] for step in (15, 16)], rel=1e-5)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("--config.mesh.stage=8", "--config.mesh.fsdp=1"), "config.model: decoder: 2 layers do not divide into the 8"),
        (("--config.mesh.stage=2", "--config.mesh.pipeline.micro_batches=3"), "3 micro-batches of the pipeline x 4"),
        (("--config.mesh.pipeline.repeats=0",), "config.mesh.pipeline.repeats=0 should be at least 1"),
        (("--config.mesh.stage=2", "--config.model.dtype.products=int8"), "by the same numbers; use int8_forward"),
        (("--config.mesh.stage=2", "--config.model.remat=context:0.5"), "all layers save the same"),
        (("--config.mesh.stage=2", "--config.model.remat=q@host"), "all layers save the same"),
    ],
)
def test_stages_that_do_not_fit_are_refused_in_one_line(tmp_path, capsys, arguments, message):
    assert train(tmp_path / "run", *arguments, "--check") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_of_two_stacks_the_one_that_does_not_divide_is_named(tmp_path, capsys):
    layers = ("--config.model.encoder.layers=3", "--config.model.decoder.layers=4")
    assert train(tmp_path / "run", *layers, "--config.mesh.stage=2", "--check", config=T5) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "config.model: encoder: 3 layers do not divide into the 2 stretches" in line


def test_dropout_in_stages_is_refused_where_jax_draws_otherwise(tmp_path, capsys):
    with jax.default_prng_impl("rbg"):
        assert train(tmp_path / "run", "--config.mesh.stage=2", "--config.model.dropout=0.1", "--check") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "config.model.dropout=0.1 in stages" in line and "jax_default_prng_impl=rbg" in line
