"""The base of a trained part is told by what the run has read of it, which may be less than it holds."""

import pytest

from t5x_like.core.errors import UserError
from t5x_like.storage import base as bases

WEIGHTS = {"embed/tokens": 1, "layers/mlp/up": 2, "heads/reward/weight": 3}


@pytest.fixture
def stored(monkeypatch):
    """Two checkpoints by name: a reward model, and an adapter on it."""
    notes = {"reward": {"arrays": {"params": dict.fromkeys(WEIGHTS, {})}, "fingerprints": {"params": WEIGHTS}}}
    monkeypatch.setattr(bases, "read_metadata", notes.__getitem__)
    monkeypatch.setattr(bases, "_is_checkpoint", notes.__contains__)
    monkeypatch.setattr(bases, "read_item", lambda name, item: dict(notes[name]["fingerprints"][item]))

    def adapter(wanted, own=("adapters/layers/mlp/up/a",)):
        found = dict.fromkeys(own, 9)
        named = {"directory": "reward", "fingerprint": bases.fingerprint("reward", wanted)}
        notes["adapter"] = {"arrays": {"params": found}, "fingerprints": {"params": found}, "base": named}

    return adapter


@pytest.mark.parametrize("heads", [True, False])
def test_a_run_without_a_head_reads_a_base_with_one(stored, heads):
    read = [path for path in WEIGHTS if heads or not path.startswith("heads/")]
    stored(read)
    leaves, known = bases.readers("adapter", "params")
    assert leaves.keys() == known.keys() == {*read, "adapters/layers/mlp/up/a"}


def test_a_head_that_is_trained_is_the_runs_own(stored):
    stored([path for path in WEIGHTS if not path.startswith("heads/")], own=("heads/reward/weight", "adapters/a"))
    leaves, _ = bases.readers("adapter", "params")
    assert leaves["heads/reward/weight"] == 9 and len(leaves) == len(WEIGHTS) + 1


def test_another_base_is_refused(stored):
    stored(["embed/tokens"])
    with pytest.raises(UserError):
        bases.readers("adapter", "params")
