"""Claims that scores and answers are those of lm-evaluation-harness's own backend on transformers, one by one."""

import pytest

from t5x_like.language_model import load
from tests.evaluation import worlds

MODELS = ("stories", "gpt2", "t5")


@pytest.fixture(scope="session")
def harness_says(tasks, folder_of):
    """Function from the name of a model to {task: samples} of the harness's own backend.

    bos: whether it puts special tokens around texts. Its rolling windows score them too, which no measure of a text
    should; so rolling perplexity is compared without.
    """
    import lm_eval

    def evaluate(name, names, bos=None):
        folder = folder_of(name)
        backend = worlds.theirs(folder, max_length=load(str(folder)).model.config.max_length, bos=bos)
        return lm_eval.simple_evaluate(backend, tasks=names, task_manager=tasks.of(names), bootstrap_iters=2)["samples"]

    return evaluate


def pairs(mine, theirs):
    """(our answer, their answer) to each request of the same documents."""
    for left, right in zip(mine, theirs, strict=True):
        assert left["doc_hash"] == right["doc_hash"] and left["arguments"] == right["arguments"]
        yield from ((a[0], b[0]) for a, b in zip(left["resps"], right["resps"], strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_every_request_is_answered_as_by_the_harness(name, evaluated, harness_says):
    mine, theirs = evaluated(name).samples, harness_says(name, ["choice", "word", "story"])
    scores = [pair for task in ("choice", "word") for pair in pairs(mine[task], theirs[task])]
    assert len({round(ours[0], 3) for ours, _ in scores}) > 60  # the answers differ where they should
    for (logp, greedy), (expected, is_greedy) in scores:
        assert logp == pytest.approx(expected, rel=1e-5, abs=1e-5) and greedy == is_greedy
    answers = list(pairs(mine["story"], theirs["story"]))
    assert len({ours for ours, _ in answers}) > 2
    for ours, expected in answers:
        # An encoder-decoder of the harness may add as many tokens more as its prompt has.
        assert ours == (expected[: len(ours)] if name == "t5" else expected)


@pytest.mark.parametrize("name", MODELS)
def test_rolling_likelihoods_are_those_of_the_harness_without_special_tokens(name, evaluated, harness_says):
    mine = evaluated(name).samples["page"]
    found = list(pairs(mine, harness_says(name, ["page"], bos=False)["page"]))
    assert len(found) == len(worlds.RECORDS["page"])
    for ours, expected in found:
        assert ours == pytest.approx(expected, rel=1e-5)
    for ours, expected in pairs(mine, harness_says(name, ["page"])["page"]):
        assert ours > expected + 0.1  # BOS or EOS of each text scored as well
