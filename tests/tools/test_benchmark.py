"""Claims about tools/benchmark: the workers of all peers run, on shapes that take no time, and do the same thing."""

import pytest

from tools.benchmark import convert, decode, sft_step, shape, step, t5_step, timing

SMALL = {"width": 32, "layers": 1, "heads": 2, "mlp": 48, "vocab": 256, "rows": 8, "length": 16}


@pytest.fixture
def small(monkeypatch):
    """The tiny shape in the place of the measured one; 8 rows, since there are 8 devices."""
    for name, value in SMALL.items():
        monkeypatch.setitem(shape.SHAPE, name, value)
        if name in t5_step.SHAPE:
            monkeypatch.setitem(t5_step.SHAPE, name, value)
    for name, value in {"head_size": 16, "source": 12}.items():
        monkeypatch.setitem(t5_step.SHAPE, name, value)
    monkeypatch.setattr(decode, "PROMPT", 5)
    monkeypatch.setattr(decode, "NEW", 6)


@pytest.mark.parametrize("measurement,peer", [(step, "torch"), (t5_step, "torch"), (sft_step, "trl")])
def test_a_training_step_of_both_peers_begins_at_the_loss_of_a_guess(small, measurement, peer):
    results = [measurement.WORKERS[name]({"steps": 1}) for name in ("ours", peer)]
    for result in results:
        assert result["seconds"] > 0
        assert result["loss"] == pytest.approx(5.55, abs=1.5)  # ln 256, and what initial logits add


def test_both_peers_continue_alike_from_equal_weights(small, tmp_path):
    folder = str(tmp_path / "model")
    decode.WORKERS["weights"]({"folder": folder})
    values = {"folder": folder, "rows": 2, "steps": 1}
    ours, theirs = (decode.WORKERS[name](values)["tokens"] for name in ("ours", "transformers"))
    assert ours == theirs and [len(row) for row in ours] == [6, 6]


def test_a_checkpoint_is_copied_and_converted_there_and_back(tmp_path, monkeypatch):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    for name, value in sizes.items():
        monkeypatch.setitem(convert.SHAPE, name, value)
    monkeypatch.setattr(convert, "VOCAB", 256)
    values = {"folder": str(tmp_path), "source": str(tmp_path / "source")}
    size = convert.WORKERS["source"](values)["bytes"]
    for name in ("copy", "to_native", "to_huggingface"):
        assert convert.WORKERS[name](values)["wall"] > 0
    there_and_back = sum(path.stat().st_size for path in (tmp_path / "huggingface").glob("*.safetensors"))
    assert there_and_back == pytest.approx(size, rel=0.1)


def test_a_ratio_is_the_median_of_pairs_taken_in_turns():
    ours, theirs = [{"seconds": 1.0}, {"seconds": 2.0}, {"seconds": 9.0}], [{"seconds": 2.0}, {"seconds": 4.0}] * 2
    assert timing.ratio(theirs[:3], ours) == " 2.00x (rounds 0.22 to 2.00)"
