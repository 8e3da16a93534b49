"""Tokenizer folders give the ids, special tokens and added tokens that transformers gives, or are refused by name."""

import json
import pathlib
import shutil

import pytest
import sentencepiece

from t5x_like.core.errors import UserError
from t5x_like.data.tokenizers import tokenizer_training, vocabularies
from t5x_like.data.tokenizers.long_texts import encode as encode_long
from tests.data import corpus

STORIES = pathlib.Path(__file__).parents[1] / "stories260K"
TEXTS = (
    *(
        "Hello world, it's 12345.",
        "two lines\n\nnew\tone",
        "Stra\u00dfe caf\u00e9 e\u0301 \u543e\u8f29 \U0001f600",
        "x",
    ),
    *("a<tool> b<tool>c", "Don't you'll", "x", "def f(x):\n    return 3", *corpus.SENTENCES),
)
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
NAMES = ("bert", "cased", "gpt2", "roberta", "qwen", "llama", "chatml", "mistral", "legacy", "t5", "json")


def settings(folder, **given):
    (folder / "tokenizer_config.json").write_text(json.dumps(given))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """One folder a kind, from small tokenizers that are trained here."""
    root = tmp_path_factory.mktemp("folders")
    for name in NAMES:
        (root / name).mkdir()
    lines = [line for text in corpus.paragraphs(40) for line in text.split("\n")]
    write_word_pieces(root, lines)
    made = tokenizer_training.train("bpe", 400, corpus.paragraphs(40))
    made.save(str(root / "made"))
    model = json.loads((root / "made" / "tokenizer.json").read_text())["model"]
    for name in ("gpt2", "qwen", "roberta"):
        vocabulary = dict(model["vocab"])
        if name == "roberta":
            del vocabulary["<|endoftext|>"]
            vocabulary |= {token: 400 + at for at, token in enumerate(("<s>", "<pad>", "</s>", "<unk>", "<mask>"))}
            vocabulary["<extra>"] = 0
        (root / name / "vocab.json").write_text(json.dumps(vocabulary))
        merges = "\n".join(" ".join(merge) for merge in model["merges"])
        (root / name / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    settings(root / "gpt2", tokenizer_class="GPT2Tokenizer")
    roberta = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    settings(root / "roberta", tokenizer_class="RobertaTokenizer", **roberta)
    added = {"400": ("<|im_start|>", True), "401": ("<|im_end|>", True), "402": ("<tool>", False)}
    decoder = {at: {"content": content, "special": special, **FLAGS} for at, (content, special) in added.items()}
    named = {"eos_token": "<|im_end|>", "bos_token": None, "unk_token": None, "pad_token": "<|endoftext|>"}
    settings(root / "qwen", tokenizer_class="Qwen2Tokenizer", added_tokens_decoder=decoder, **named)
    write_sentencepieces(root, lines)
    shutil.copy(root / "made" / "tokenizer.json", root / "json")
    settings(root / "json", tokenizer_class="PreTrainedTokenizerFast", added_tokens_decoder=decoder, **named)
    return root


def write_word_pieces(root, lines):
    from tokenizers import BertWordPieceTokenizer

    for name, lowercase in (("bert", True), ("cased", False)):
        tokenizer = BertWordPieceTokenizer(lowercase=lowercase)
        tokenizer.train_from_iterator(lines, vocab_size=300, show_progress=False)
        tokenizer.save_model(str(root / name))
    settings(root / "bert", tokenizer_class="BertTokenizer", do_lower_case=True)
    settings(root / "cased", tokenizer_class="BertTokenizer", do_lower_case=False)


def write_sentencepieces(root, lines):
    sentencepiece.SentencePieceTrainer.train(  # as Llama's: nothing of a text is changed
        sentence_iterator=iter(lines),
        model_prefix=str(root / "llama" / "tokenizer"),
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        vocab_size=420,
        num_threads=1,
        minloglevel=2,
    )
    llama = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "unk_token": "<unk>"}
    for name in ("chatml", "legacy", "mistral"):
        shutil.copy(root / "llama" / "tokenizer.model", root / name)
    settings(root / "llama", eos_token="</s>", **llama)
    settings(root / "chatml", eos_token="<|im_end|>", **llama)
    added = {"<|im_start|>": 420, "<|im_end|>": 421, "<tool>": 422}
    (root / "chatml" / "added_tokens.json").write_text(json.dumps(added))
    settings(root / "legacy", legacy=True, **llama)
    (root / "legacy" / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>", **FLAGS}}))
    (root / "legacy" / "added_tokens.json").write_text(json.dumps({"<tool>": 420}))
    shared = {"sentence_iterator": iter(lines), "num_threads": 1, "minloglevel": 2, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        **shared, model_prefix=str(root / "t5" / "spiece"), vocab_size=120, pad_id=0, eos_id=1, unk_id=2, bos_id=-1
    )
    settings(root / "t5", tokenizer_class="T5Tokenizer", eos_token="</s>", extra_ids=100)
    prompts = {
        str(420 + at): {"content": text, "special": True, **FLAGS} for at, text in enumerate(("[INST]", "[/INST]"))
    }
    settings(root / "mistral", eos_token="</s>", added_tokens_decoder=prompts, **llama)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_gives_what_transformers_gives(root, name, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(root / name))
    ours = vocabularies.load(str(root / name))
    # Of U+0085 transformers makes a space where the model itself does not know it.
    for text in [text.replace("\x85", " ") for text in TEXTS] if name == "t5" else TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
    assert ours.size == len(theirs)
    begin, end = theirs.bos_token_id, theirs.eos_token_id
    if name in ("bert", "cased"):
        begin, end = theirs.cls_token_id, theirs.sep_token_id
    assert (ours.bos_id, ours.eos_id) == (None if begin == end else begin, end)
    if ours.exact:
        for content, token in theirs.get_added_vocab().items():
            special = content in theirs.all_special_tokens or theirs.added_tokens_decoder[token].special
            assert ours.decode([token]) == ("" if special else content) or content == "<unk>"
    assert ("<tool>" in theirs.get_added_vocab()) == (name in ("qwen", "chatml", "legacy", "json"))
    ours.save(str(tmp_path / "saved"))
    again = vocabularies.load(str(tmp_path / "saved"))
    assert (again.fingerprint, again.size, again.bos_id, again.eos_id) == (
        ours.fingerprint,
        ours.size,
        ours.bos_id,
        ours.eos_id,
    )
    assert [again.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]


@pytest.mark.parametrize("name", NAMES)
def test_bytes_add_up_and_parts_are_the_whole(root, name):
    vocabulary = vocabularies.load(str(root / name))
    for text in TEXTS:
        ids, lengths = vocabulary.encode_batch([text])
        assert vocabulary.count_bytes([text], ids, lengths).sum() == len(text.encode()), text
    text = " ".join(TEXTS)
    parts = [part for part, _ in encode_long(vocabulary, text, size=30)]
    assert [token for part in parts for token in part.tolist()] == vocabulary.encode(text) and len(parts) > 3


def test_texts_with_added_tokens_come_back(root):
    for name in ("qwen", "json", "mistral", "chatml"):
        vocabulary = vocabularies.load(str(root / name))
        assert vocabulary.decode(vocabulary.encode("a<tool>b")) == "a<tool>b"
        assert vocabulary.eos_id not in vocabulary.encode("a<|im_end|></s>b")  # a special token in a text is text


def test_a_tokenizer_says_whether_it_is_lossless(root):
    assert vocabularies.load(str(root / "json")).loses == vocabularies.load("bytes").loses == ""
    assert vocabularies.load(str(root / "bert")).loses == "'Aa' becomes 'aa'"
    assert vocabularies.load(str(root / "qwen")).loses == "'e\\u0301' becomes '\\xe9'"
    assert "becomes" in vocabularies.load(str(root / "t5")).loses


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a.tiktoken": "IQ== 0\nIg== 1\n"}, r"a\.tiktoken: a tiktoken file is not supported; use the tokenizer\.json"),
        ({"tekken.json": '{"vocab": [], "config": {}}'}, r"tekken\.json: a tekken file is not supported"),
        (
            {"vocab.txt": "[UNK]\na", "tokenizer_config.json": '{"tokenizer_class": "XTokenizer"}'},
            "XTokenizer made of",
        ),
        ({"vocab.txt": "a\nb"}, r"vocab\.txt: not the vocabulary of a WordPiece"),
        ({"vocab.json": "{}", "merges.txt": "a b c"}, r"merges\.txt: not the merges of a BPE"),
        ({"vocab.json": "[]", "merges.txt": "a b"}, r"vocab\.json: not the JSON of a tokenizer"),
        ({"tokenizer_config.json": "{"}, r"tokenizer_config\.json: not the JSON of a tokenizer"),
        ({"a.model": "", "b.model": ""}, r"has 2 \*\.model; give the path of one"),
        ({"readme.txt": ""}, r"needs vocabulary\.json, tokenizer\.json, one \*\.model, vocab\.txt"),
    ],
)
def test_what_is_not_supported_is_named_in_one_line(tmp_path, files, expected):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=expected) as caught:
        vocabularies.load(str(tmp_path))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"tokenizer_class": "XLMRobertaTokenizer"}, "a XLMRobertaTokenizer made of tokenizer.model is not supported"),
        ({"eos_token": "<nothing>"}, "names the token '<nothing>', which it lacks"),
        ({"eos_token": 7}, "eos_token should be a text, is 7"),
        (
            {"added_tokens_decoder": {"5": {"content": "x", "special": True}}},
            "its token 5 is .* add 'x'",
        ),
        ({"added_tokens_decoder": {"512": {"content": "x", "rstrip": True}}}, "takes white space with it"),
        ({"added_tokens_decoder": {"a": 3}}, "its added tokens are not"),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, change, expected):
    shutil.copy(STORIES / "tokenizer.model", tmp_path)
    settings(tmp_path, **{"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"} | change)
    with pytest.raises(UserError, match=expected) as caught:
        vocabularies.load(str(tmp_path))
    assert "\n" not in str(caught.value)
