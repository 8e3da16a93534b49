"""Checkpoints of the trained part alone: small, exact on resume, and bound to the very base that they name."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.core.errors import UsageError, UserError
from t5x_like.storage.base import restore_whole
from t5x_like.storage.checkpoint import Checkpoints
from t5x_like.training import state as train_state
from t5x_like.training.saver import Saver
from tests.training.test_state import BASE, TRAINED, base, build, initialize

MODEL = {"w": jnp.ones((8, 16)), "head": jnp.full((8, 4), 2.0), "embed": {"tokens": jnp.arange(128.0).reshape(16, 8)}}
BASE_PATHS = {"embed/tokens"}


def pretrained(directory, *, factor: float = 1.0) -> str:
    with Checkpoints(str(directory / "checkpoints")) as checkpoints:
        params = jax.tree.map(lambda leaf: leaf * factor, MODEL)
        assert checkpoints.save(7, {"params": params}, {}) and checkpoints.wait()
    return str(directory)


def saver(checkpoints, holds="trained") -> Saver:
    parts, _, layout = build(base())
    return Saver(checkpoints, parts=parts, layout=layout, holds=holds, metadata={})


@pytest.fixture
def trained(tmp_path):
    """(checkpoint directory, state, frozen): one of the trained part alone, whose base is a model of step 7."""
    source = pretrained(tmp_path / "base")
    state, frozen = initialize(build(base()), {"embed/tokens": MODEL["embed"]["tokens"]})
    with Checkpoints(str(tmp_path / "run")) as checkpoints:
        keeper = saver(checkpoints)
        keeper.begin(source, BASE_PATHS)
        keeper.save(1, state, frozen, {})
        keeper.wait()
        assert set(checkpoints.metadata(1)["arrays"]["params"]) == set(TRAINED)
        assert set(checkpoints.metadata(1)["arrays"]["ema"]) == set(TRAINED)
    return str(tmp_path / "run"), state, frozen


def test_a_resume_from_the_trained_part_is_exact_and_goes_on_naming_its_base(trained):
    directory, state, frozen = trained
    with Checkpoints(directory) as checkpoints:
        keeper = saver(checkpoints)
        found = keeper.restore()
        assert found is not None
        step, again, base_again, _ = found
        assert step == 1
        jax.tree.map(np.testing.assert_array_equal, again, state)
        jax.tree.map(np.testing.assert_array_equal, base_again, frozen)
        keeper.save(2, again, base_again, {})
        keeper.wait()
        assert checkpoints.metadata(2)["base"] == checkpoints.metadata(1)["base"]


@pytest.mark.parametrize("item", ["params", "ema"])
def test_the_whole_model_is_read_through_its_base_and_bases_of_bases(trained, tmp_path, item):
    directory, state, _ = trained
    wanted = {
        "w": jax.ShapeDtypeStruct((8, 16), jnp.float32),
        "head": jax.ShapeDtypeStruct((8, 4), jnp.float32),
        "embed": {"tokens": jax.ShapeDtypeStruct((16, 8), jnp.float32)},
    }
    whole = restore_whole(f"{directory}/1", item, wanted)
    np.testing.assert_array_equal(whole["w"], state["params"]["w"])
    np.testing.assert_array_equal(whole["embed"]["tokens"], MODEL["embed"]["tokens"])
    with Checkpoints(str(tmp_path / "again")) as checkpoints:
        from t5x_like.storage import base as bases

        metadata = {"base": bases.record(f"{directory}/1", ["w", "embed/tokens"])}
        assert checkpoints.save(1, {"params": {"head": MODEL["head"]}}, metadata) and checkpoints.wait()
    whole = restore_whole(str(tmp_path / "again" / "1"), "params", wanted)
    np.testing.assert_array_equal(whole["head"], MODEL["head"])
    np.testing.assert_array_equal(whole["embed"]["tokens"], MODEL["embed"]["tokens"])


def test_a_base_that_moved_or_changed_is_refused_in_one_line(trained, tmp_path):
    directory, _, _ = trained
    moved = pathlib.Path(tmp_path / "base").rename(tmp_path / "elsewhere")
    with Checkpoints(directory) as checkpoints:
        with pytest.raises(UserError, match=r"needs its base .*base/checkpoints/7, which is not there; move it back"):
            saver(checkpoints).restore()
        pretrained(tmp_path / "base", factor=3.0)
        with pytest.raises(UserError, match=r"was trained on other parameters than its base .* holds now"):
            saver(checkpoints).restore()
        assert checkpoints.steps() == [1], "a checkpoint is not put aside for its base"
    assert moved.exists()


def test_the_trained_part_is_saved_alone_only_where_a_base_can_be_named(tmp_path):
    source = pretrained(tmp_path / "base")
    with Checkpoints(str(tmp_path / "run")) as checkpoints:
        with pytest.raises(UsageError, match="'embed/tokens' would be drawn at random and never saved"):
            saver(checkpoints).begin(None, [])
        with pytest.raises(UsageError, match="init_select that takes all frozen parameters"):
            saver(checkpoints).begin(source, ["w"])
        whole = saver(checkpoints, "model")
        whole.save(1, *initialize(build(base()), {}), {})
        whole.wait()
        with pytest.raises(
            UsageError, match="step 1 in .* holds the whole model and names no base; go on with 'model'"
        ):
            saver(checkpoints).restore()


def with_teacher(checkpoint: str):
    source = train_state.Source(checkpoint, functools.partial(restore_whole, checkpoint, "params"))
    return build(base() | {"teacher": train_state.Frozen(BASE, base()["base"].rules, source)})


def test_other_frozen_roles_are_read_from_their_source_again_and_never_written(tmp_path):
    built = with_teacher(f"{pretrained(tmp_path / 'teacher')}/checkpoints/7")
    state, frozen = initialize(built, {})
    with Checkpoints(str(tmp_path / "run")) as checkpoints:
        keeper = Saver(checkpoints, parts=built[0], layout=built[2], holds="model", metadata={})
        keeper.save(1, state, frozen, {})
        keeper.wait()
        assert set(checkpoints.metadata(1)["arrays"]) == {"params", "ema", "optimizer", "state"}
        found = keeper.restore()
    assert found is not None
    np.testing.assert_array_equal(found[2]["teacher"]["embed"]["tokens"], MODEL["embed"]["tokens"])


def test_a_resume_goes_on_with_the_same_frozen_parameters_wherever_they_lie(tmp_path):
    first, moved, other = (
        f"{pretrained(tmp_path / name, factor=factor)}/checkpoints/7"
        for name, factor in (("first", 1.0), ("moved", 1.0), ("other", 3.0))
    )
    built = with_teacher(first)
    with Checkpoints(str(tmp_path / "run")) as checkpoints:

        def keeper(built) -> Saver:
            return Saver(checkpoints, parts=built[0], layout=built[2], holds="model", metadata={})

        one = keeper(built)
        one.save(1, *initialize(built, {}), {})
        one.wait()
        assert checkpoints.metadata(1)["roles"]["teacher"]["source"] == first
        assert keeper(with_teacher(moved)).restore() is not None
        with pytest.raises(UserError, match=f"roles.teacher: {other} now gives other .* from {first} up to step 1 in "):
            keeper(with_teacher(other)).restore()
