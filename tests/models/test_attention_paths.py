"""The attention paths that a start screen tells are those that the step takes, and slow ones are noted."""

import jax
import pytest

from t5x_like.layers.attention import choice
from t5x_like.models.attention_paths import Path, attention_paths
from t5x_like.runs import summary
from tests.models import cases


def abstract(model, rows, length, source=10):
    batch = cases.batch(model, rows, length, source=source)
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in batch.items()}
    return shapes | {name.replace("inputs", "segment_ids"): shape for name, shape in shapes.items()}


@pytest.mark.parametrize("case", ["llama_grouped_tied", "local_and_global", "t5"])
def test_the_paths_told_are_those_that_the_step_takes(case, monkeypatch):
    model, seen = cases.model(case), {}
    batch, choose = abstract(model, 2, 12), choice.attention_path

    def spy(q, k, mask, **static):
        name, why = choose(q, k, mask, **static)
        seen[(mask.causal, mask.window, q.shape[1], k.shape[1], q.shape[2])] = name, why
        return name, why

    monkeypatch.setattr(choice, "attention_path", spy)
    jax.eval_shape(lambda params, batch: model.apply(params, batch).hidden_BTD, model.specs(), batch)
    told = attention_paths(model, batch, platform="cpu", compute_capability=None)
    assert sorted((path.name, path.why) for path in told) == sorted(seen.values())
    assert {(path.shape[2], path.shape[3]) for path in told} == {call[2:4] for call in seen}
    assert len(told) == {"llama_grouped_tied": 1, "local_and_global": 2, "t5": 3}[case]


@pytest.mark.parametrize(
    ("case", "length", "platform", "expected"),
    [
        ("llama", 256, "tpu", {"decoder": "splash"}),
        ("llama", 260, "tpu", {"decoder": "blockwise"}),
        ("local_and_global", 256, "tpu", {"decoder": "splash", "decoder, window 3": "splash"}),
        ("local_and_global", 260, "tpu", {"decoder": "materialised", "decoder, window 3": "materialised"}),
        ("local_and_global", 256, "gpu", {"decoder": "materialised", "decoder, window 3": "materialised"}),
        ("t5", 256, "tpu", {"encoder": "blockwise", "decoder": "blockwise", "decoder to encoder": "blockwise"}),
        ("local_and_global", 260, "cpu", {"decoder": "materialised", "decoder, window 3": "materialised"}),
    ],
)
def test_a_length_that_no_kernel_takes_is_noted(case, length, platform, expected):
    model = cases.model(case, max_length=512)
    told = attention_paths(model, abstract(model, 2, length, 128), platform=platform, compute_capability=None)
    assert {path.where: path.name for path in told} == expected
    notes = list(summary.slow_paths(told, platform))
    slow = [] if platform == "cpu" else [path.where for path in told if path.name != "splash"]
    assert len(notes) == len(slow) and all(where in note for where, note in zip(slow, notes, strict=True))


def test_the_note_says_what_is_held_and_why():
    path = Path("decoder", "materialised", "no splash: length 4100 is no multiple of 128; not blockwise: a softcap",
                (8, 16, 4100, 4100))  # fmt: skip
    (note,) = summary.slow_paths([path], "tpu")
    assert "8 x 16 x 4100 x 4100" in note and "8.02 GiB" in note and "4100 is no multiple of 128" in note
