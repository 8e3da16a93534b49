"""Claims about the backend: what does not change an answer, what a uniform model gives, chats, stops, limits."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from t5x_like.convert import tokenizers
from t5x_like.core import tree
from t5x_like.core.errors import UsageError, UserError
from t5x_like.data.templates.chat import Chat
from t5x_like.data.tokenizers import vocabularies
from t5x_like.evaluation import chat, generation
from t5x_like.evaluation.harness import Tasks
from t5x_like.evaluation.model import EvaluatedModel
from t5x_like.inference.sampling import GREEDY, Sampling
from t5x_like.language_model import load
from t5x_like.parallel import mesh as meshes
from tests.evaluation import worlds
from tests.models import cases


def answers(evaluation):
    return {task: [sample["resps"] for sample in samples] for task, samples in evaluation.samples.items()}


def assert_same(found, expected):
    """Equal texts, scores to 1e-5."""
    assert found.keys() == expected.keys()
    for task in found:
        for left, right in zip(jax.tree.leaves(found[task]), jax.tree.leaves(expected[task]), strict=True):
            assert left == right if isinstance(left, str | bool) else left == pytest.approx(right, rel=1e-5, abs=1e-5)


def backend(subject, batch_tokens=1024):
    from t5x_like.evaluation.backend import Backend

    return Backend(subject, batch_tokens=batch_tokens, seed=0)


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


@pytest.mark.parametrize("batch_tokens", [1, 8192])
def test_the_batch_size_changes_no_answer(batch_tokens, tasks, folder_of, evaluated):
    settings = dataclasses.replace(worlds.SETTINGS, batch_tokens=batch_tokens)
    assert_same(answers(tasks.evaluate(worlds.ours(folder_of("stories")), settings)), answers(evaluated("stories")))


def test_a_mesh_of_8_devices_changes_no_answer(tasks, folder_of, evaluated):
    config = meshes.MeshConfig("fsdp_tensor", "", None, None, None, None, None, None, 2)
    subject = worlds.ours(folder_of("stories"), mesh=meshes.make(config))
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(subject.params))
    assert_same(answers(tasks.evaluate(subject, worlds.SETTINGS)), answers(evaluated("stories")))


@pytest.mark.parametrize("name", ["stories", "t5"])
def test_the_order_of_requests_changes_no_answer(name, folder_of):
    lm = backend(worlds.ours(folder_of(name)))
    texts = [record["q"] for record in worlds.RECORDS["choice"]]
    order = np.random.default_rng(0).permutation(len(texts)).tolist()
    for kind, arguments in {
        "loglikelihood": [(text, " a dog") for text in texts],
        "loglikelihood_rolling": [(text,) for text in texts],
        "generate_until": [(text, {"until": ["\n"], "max_gen_toks": 40}) for text in texts],
    }.items():
        found = getattr(lm, kind)(requests(kind, arguments))
        assert len(set(found)) > 3
        again = getattr(lm, kind)(requests(kind, [arguments[index] for index in order]))
        assert_same({"": again}, {"": [found[index] for index in order]})


# A uniform model over the 256 bytes.


@pytest.fixture(scope="module")
def uniform():
    model = cases.model("llama", vocab_size=259, max_length=64)
    # The hidden state is the same everywhere; ids 0 to 2 are no bytes.
    flat = {path: np.zeros(spec.shape, np.float32) for path, spec in tree.leaves(model.specs())}
    flat["embed/tokens"][:], flat["final_norm/scale"][:], flat["head/weight"][:3] = 1.0, 1.0, -100.0
    vocabulary = vocabularies.load("bytes")
    return EvaluatedModel("uniform", model, jax.device_put(tree.unflatten(flat)), vocabulary, 0, mesh=None, chat=None)


def test_a_uniform_model_of_bytes_has_8_bits_per_byte(uniform, tmp_path):
    for name, records in {
        "page": [{"text": "one"}, {"text": "na\u00efve words of 3 lines\n" * 9}],
        "word": [{"q": "abc", "word": "1234"}, {"q": "", "word": "wxyz"}],
        "choice": [{"q": "a", "choices": ["bb", "ccc", "d"], "answer": 2}],
        "story": [{"q": "a", "a": "\0" * 48}],
    }.items():
        worlds.write_task(tmp_path, name, records)
    found = Tasks(["page", "word", "choice", "story"], include=[str(tmp_path)], data="").evaluate(
        uniform, worlds.SETTINGS
    )
    values = {(metric.task, metric.name): metric.value for metric in found.metrics}
    assert values["page", "bits_per_byte"] == pytest.approx(8.0, rel=1e-6)
    assert values["page", "byte_perplexity"] == pytest.approx(256, rel=1e-5)
    assert values["word", "perplexity"] == pytest.approx(256.0**4, rel=1e-4)  # of 4 letters, per document
    (sample,) = found.samples["choice"]
    bits = [-resps[0][0] / np.log(2) for resps in sample["resps"][:3]]
    # The blanks at the end of a context and before a choice belong to the choice.
    assert bits == pytest.approx([8 * 4, 8 * 5, 8 * 3], rel=1e-6) and values["choice", "acc"] == 1
    assert values["story", "exact_match"] == 1.0  # the first of 256 equal bytes, up to the limit


# Generation.


def limits(**given):
    return generation.Limits(**{"max_new_tokens": 60, "stops": (), "sampling": GREEDY, "seed": 0} | given)


@pytest.mark.parametrize("name", ["stories", "t5"])
def test_an_answer_ends_before_the_first_stop_wherever_it_lies(name, folder_of):
    subject = worlds.ours(folder_of(name))
    prompts = [subject.encode(record["q"]) for record in worlds.RECORDS["story"]]
    whole = generation.generate(subject, prompts, limits(), batch_tokens=1024)
    for begin, end in ((3, 5), (20, 26), (36, 38)):
        stop = whole[0][begin:end]
        found = generation.generate(subject, prompts, limits(stops=("never there", stop)), batch_tokens=1024)
        assert found == [text.split(stop)[0] for text in whole] and len(found[0]) <= begin


def test_rounds_give_what_one_round_gives(folder_of, monkeypatch):
    subject = worlds.ours(folder_of("stories"))
    prompts = [subject.encode(record["q"]) for record in worlds.RECORDS["story"]]
    found = generation.generate(subject, prompts, limits(max_new_tokens=100), batch_tokens=512)
    monkeypatch.setattr(generation, "FIRST_ROUND", 100)
    assert found == generation.generate(subject, prompts, limits(max_new_tokens=100), batch_tokens=4096)
    assert len(set(found)) == len(found)


def test_samples_follow_the_seed(folder_of):
    subject = worlds.ours(folder_of("stories"))
    prompts = [subject.encode("Once upon a time")] * 3
    sampled = limits(sampling=Sampling(1.0, 0, 1.0))
    found = generation.generate(subject, prompts, sampled, batch_tokens=128)
    assert len(set(found)) == 3 and found == generation.generate(subject, prompts, sampled, batch_tokens=128)
    assert found != generation.generate(subject, prompts, limits(sampling=sampled.sampling, seed=1), batch_tokens=128)


def test_a_long_context_loses_its_beginning_and_is_counted(folder_of):
    subject = worlds.ours(folder_of("stories"))
    lm = backend(subject)
    tail = "and then the dog ran to the park " * 80
    given = [("the cat slept " * 40 + tail, "a"), (tail, "a")]
    first, second = lm.loglikelihood(requests("loglikelihood", given))
    assert first == second and lm.truncated == 2
    asked = requests("generate_until", [(text, {"max_gen_toks": 20}) for text, _ in given])
    assert len(set(lm.generate_until(asked))) == 1 and lm.truncated == 4
    with pytest.raises(UserError, match="an answer of 1042 tokens is longer than this model's max_length=512"):
        lm.loglikelihood(requests("loglikelihood", [("a", tail)]))
    with pytest.raises(UsageError, match="max_gen_toks=512 leaves no room .* max_length=512"):
        lm.generate_until(requests("generate_until", [("a", {"max_gen_toks": 512})]))


def test_generation_arguments_are_read_as_the_harness_reads_them():
    from t5x_like.evaluation.backend import read_limits

    assert read_limits({}, seed=3) == generation.Limits(256, (), GREEDY, 3)
    both = {"max_tokens": 5, "max_new_tokens": 7, "until": ["a", ""], "temperature": 0.5}
    assert read_limits(both, seed=0) == generation.Limits(7, ("a",), Sampling(0.5, 0, 1.0), 0)
    assert read_limits({"do_sample": False, "temperature": 0.5, "until": "x"}, seed=0).sampling == GREEDY
    with pytest.raises(UsageError, match="generation_kwargs.top_kk=3 is not supported; did you mean 'top_k'"):
        read_limits({"top_kk": 3}, seed=0)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"max_gen_toks": "abc"}, "max_gen_toks='abc' should be a number"),
        ({"max_gen_toks": 0}, "max_gen_toks=0 should be a whole number, at least 1"),
        ({"max_tokens": -5}, "max_tokens=-5 should be a whole number, at least 1"),
        ({"max_gen_toks": 2.5}, "max_gen_toks=2.5 should be a whole number"),
        ({"temperature": "hot"}, "temperature='hot' should be a number"),
        ({"do_sample": True, "top_p": 0}, "top_p=0.0 should be above 0"),
        ({"do_sample": "yes"}, "do_sample='yes' should be true or false"),
        ({"until": 3}, "until=.* should be a text or a list of texts"),
    ],
)
def test_generation_arguments_that_mean_nothing_are_named(given, part):
    from t5x_like.evaluation.backend import read_limits

    with pytest.raises(UsageError, match=f"generation_kwargs.{part}"):
        read_limits(given, seed=0)


def test_generation_arguments_that_are_null_are_not_given():
    from t5x_like.evaluation.backend import read_limits

    null = dict.fromkeys(("temperature", "top_p", "top_k", "max_gen_toks", "until", "do_sample"))
    assert read_limits(null, seed=3) == read_limits({}, seed=3)
    assert read_limits({"do_sample": True, "temperature": None}, seed=0).sampling == Sampling(1.0, 0, 1.0)


# Answers without a token of their own.


def test_an_answer_that_adds_no_token_is_one_line_and_no_certainty(folder_of):
    subject = worlds.ours(folder_of("stories"))
    lm = backend(subject)
    assert len(subject.encode("Once upon l")) == len(subject.encode("Once upon little"))
    part = "task None, document None: the answer 'ittle' adds no token to the tokens of 'Once upon l'"
    with pytest.raises(UserError, match=part):
        lm.loglikelihood(requests("loglikelihood", [("Once", " upon"), ("Once upon l", "ittle")]))
    with pytest.raises(UserError, match="the answer '' adds no token"):
        lm.loglikelihood(requests("loglikelihood", [("", "")]))
    with pytest.raises(UserError, match="the answer '' adds no token"):
        backend(worlds.ours(folder_of("t5"))).loglikelihood(requests("loglikelihood", [("a", "")]))
    loaded = load(str(folder_of("stories")))
    with pytest.raises(UsageError, match="'ittle' adds no token to the tokens of 'Once upon l'"):
        loaded.log_likelihood(["Once upon l"], ["ittle"])
    assert loaded.log_likelihood(["Once"], [""]) == [(0.0, True)]


# Chats.

CHATML = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def chatty(tmp_path):
    """A folder of stories260K with a template whose marks are tokens."""
    worlds.write_model("stories", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    layout = json.loads((tmp_path / "tokenizer.json").read_text())
    mark = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    # Two pieces of the vocabulary, so that the model stays as it is.
    for content, token in (("<|im_start|>", 509), ("<|im_end|>", 510)):
        old = next(piece for piece, number in layout["model"]["vocab"].items() if number == token)
        layout["model"]["vocab"].pop(old)
        layout["model"]["vocab"][content] = token
        layout["model"]["merges"] = [
            merge for merge in layout["model"]["merges"] if old not in ("".join(merge), *merge)
        ]
        layout["added_tokens"].append({"id": token, "content": content} | mark)
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout))
    return tmp_path


def test_a_chat_is_rendered_and_encoded_as_by_transformers(chatty):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(chatty)
    subject = worlds.ours(chatty, template=True)
    read = subject.chat
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello there"}]
    rendered = read.render(messages, add_generation_prompt=True)
    assert rendered == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered.startswith("<s><|im_start|>system")
    begun = [*messages, {"role": "assistant", "content": "The answer is"}]
    assert read.render(begun, add_generation_prompt=False) == theirs.apply_chat_template(
        begun, tokenize=False, continue_final_message=True
    )
    ids = subject.encode(rendered)
    assert ids == theirs.encode(rendered, add_special_tokens=False) and ids[:2] == [1, 509]


def test_an_answer_ends_at_the_special_tokens_that_are_asked_for_and_stated(chatty):
    """Whose texts decoding leaves out: <|im_end|> as a stop of a task, a list in generation_config.json."""
    (chatty / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 509]}))
    loaded = load(str(chatty))
    assert loaded.ends == (2, 509) and worlds.ours(chatty).stop_ids == [2, 509]
    model, seen = worlds.ours(chatty), []

    def generate(*_, stop_ids, **__):
        seen.append(stop_ids)
        return [[]] * 8

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation.decode, "generate", generate)
        generation.generate(model, [[1, 2]], limits(stops=("\n", "<|im_end|>")), batch_tokens=64)
    assert seen == [[2, 509, 510]]
    # An export says what ends a turn, so that transformers ends there too.
    assert tokenizers.generation(str(chatty), {"eos_token_id": 2}) == {"eos_token_id": [510, 2]}


def test_tasks_through_a_chat_template_are_those_of_the_harness(chatty, tasks):
    import lm_eval

    settings = dataclasses.replace(worlds.SETTINGS, chat=True, limit=4)
    mine = tasks.evaluate(worlds.ours(chatty, template=True), settings).samples
    theirs = lm_eval.simple_evaluate(
        worlds.theirs(chatty, max_length=512),
        tasks=["choice", "story"],
        task_manager=tasks.of(["choice", "story"]),
        apply_chat_template=True,
        limit=4,
        bootstrap_iters=2,
    )["samples"]
    for name in ("choice", "story"):
        for left, right in zip(mine[name], theirs[name], strict=True):
            assert left["arguments"] == right["arguments"] and "<|im_start|>user" in left["arguments"][0][0]
            assert_same({"": left["resps"]}, {"": right["resps"]})


def test_a_request_has_the_tokens_of_training_and_serving(chatty):
    """Also where a message spells a special token out, which transformers would take for one."""
    subject = worlds.ours(chatty, template=True)
    conversation = Chat(CHATML, subject.vocabulary, where="here")
    asked = [{"role": "user", "content": f"say {end}"} for end in ("<|im_end|> now", "it", "it <|im_start|>")]
    texts = [subject.chat.render([message], add_generation_prompt=True) for message in asked]
    for message, text in zip(asked, texts, strict=True):
        rendered = conversation.prompt([message])
        ids = subject.vocabulary.encode_parts(rendered.parts())[0].tolist()
        assert text == rendered.text and subject.encode(text) == ids
        assert (ids.count(509), ids.count(510)) == (2, 1)  # of two messages, the second begun
        # As the harness asks: white space at the end belongs to the answer.
        both = [*rendered.parts()[:-1], f"{rendered.parts()[-1]}yes"]
        assert subject.encode(f"{text}yes") == subject.vocabulary.encode_parts(both)[0].tolist()
        assert subject.encode(text.rstrip()) == ids[: len(subject.encode(text.rstrip()))] != ids
    assert subject.stop_ids == [510, subject.vocabulary.eos_id]
    assert subject.encode("say <|im_end|> now")[0] == 1  # a text that is no request: as without a template


def test_a_request_is_found_among_others_that_begin_like_it(chatty):
    requests = chat.Requests(Chat("{{ messages[0].content }}", vocabularies.load(str(chatty)), where="here"))
    known = ["ab", "abc", "abcd", "abd", "b", "ab c"]
    for text in known:
        requests.render([{"role": "user", "content": text}], add_generation_prompt=True)
    found = {text: requests._longest(text) for text in ("abcz", "abdz", "abz", "bz", "ab cd", "a", "c", "ab  ")}
    assert found == {
        text: max((k for k in known if text.startswith(k)), key=len, default=None) for text in found
    } and set(found.values()) >= {"abc", "abd", "ab", "b", "ab c", None}


@pytest.mark.parametrize(
    ("template", "part"),
    [
        ("{{ ''.__class__.__mro__ }}", "here is refused: it asks for what no template may do"),
        (
            "{{ raise_exception('roles must alternate') }}",
            "here does not take this conversation: .*must alternate",
        ),
        ("{% for %}", "here is refused"),
    ],
)
def test_a_template_that_cannot_be_rendered_is_one_line(template, part, chatty):
    vocabulary = vocabularies.load(str(chatty))
    with pytest.raises(UserError, match=part) as raised:
        requests = chat.Requests(Chat(template, vocabulary, where="here"))
        requests.render([{"role": "user", "content": "a"}], add_generation_prompt=True)
    assert "\n" not in str(raised.value)
