"""Tokenizer folders give the ids, special tokens and added tokens that transformers gives, or are refused by name."""

import json
import pathlib
import random
import shutil

import pytest
import sentencepiece

from t5x_like.core.errors import UserError
from t5x_like.data.tokenizers import tokenizer_training, vocabularies
from t5x_like.data.tokenizers.long_texts import encode as encode_long
from t5x_like.runs import summary
from tests.data import corpus

STORIES = pathlib.Path(__file__).parents[1] / "stories260K"
PARTS = (  # spaces, added tokens and what may stand at their edges, forms of letters, scripts, emoji
    *("a", "fox", "foxy", "Hello", "don't", "1234", "{", ".", " ", " ", "  ", "\n", "\t", "\r\n", "\u3000", "\u00a0"),
    *("<tool>", "<tool>", "<L>", "<R>", "<B>", "<N>", "\u00e9", "e\u0301", "\u00df", "\ufb01", "\u543e\u8f29", "\x85"),
    *("\U0001f600", "\u0627", "\u200b", "\u2581", "\x01", "def f(x):\n    return 3"),
)


def mixed(count):
    draw = random.Random(0)
    return ["".join(draw.choices(PARTS, k=draw.randint(1, 9))) for _ in range(count)]


TIES = [letter * count for letter in "ae." for count in range(1, 40)]  # of unigrams, decided by a score's last bit
TEXTS = ("", *TIES, " ", "  ", "\n", " a", "a ", "  a  b ", "x", *mixed(300), *corpus.SENTENCES)
TEKKEN = (
    '{"config": {"pattern": "a", "version": "v3"}, "vocab": [{"rank": 0, "token_bytes": "AA==", "token_str": null}]}'
)
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
LLAMAS = ("llama", "chatml", "mistral", "legacy", "white", "white_legacy", "white_no_prefix", "code_llama")
OTHERS = ("t5", "t5_listed", "t5_added", "t5_white", "gemma", "gemma_white", "xlm_roberta", "xlm_white", "xlm_family")
NAMES = ("bert", "cased", "bert_white", "gpt2", "roberta", "qwen", "json", *LLAMAS, *OTHERS)


def white(first):
    """Added tokens that take white space with them, stand for whole words, are found in normalized text, or special."""
    kinds = {"<L>": "lstrip", "<R>": "rstrip", "fox": "single_word", "<N>": "normalized", "<S>": "special"}
    tokens = [{"content": content, "special": False, **FLAGS, flag: True} for content, flag in kinds.items()]
    tokens.append({"content": "<B>", "special": False, **FLAGS, "lstrip": True, "rstrip": True})
    return {"added_tokens_decoder": {str(first + at): token for at, token in enumerate(tokens)}}


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
    shutil.copy(root / "bert" / "vocab.txt", root / "bert_white")
    size = len((root / "bert" / "vocab.txt").read_text().splitlines())
    settings(root / "bert_white", tokenizer_class="BertTokenizer", **white(size))


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
    for name in (*LLAMAS[1:], "gemma", "gemma_white"):
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
    settings(root / "white", eos_token="</s>", **llama, **white(420))
    settings(root / "white_legacy", eos_token="</s>", legacy=True, **llama, **white(420))
    settings(root / "white_no_prefix", eos_token="</s>", add_prefix_space=False, **llama, **white(420))
    settings(root / "code_llama", tokenizer_class="CodeLlamaTokenizer")
    gemma = {"tokenizer_class": "GemmaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    settings(root / "gemma", **gemma)
    settings(root / "gemma_white", **gemma, **white(420))
    write_unigrams(root)


def write_unigrams(root):
    """Folders of T5 and XLM-R with the model of "t5", which has 120 pieces at most."""
    model = (root / "t5" / "spiece.model").read_bytes()
    for name in OTHERS:
        if not name.startswith("gemma"):
            place = "sentencepiece.bpe.model" if name.startswith("xlm") else "spiece.model"
            (root / name / place).write_bytes(model)
    size = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    t5 = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100}
    listed = [f"<extra_id_{at}>" for at in range(100)]
    settings(root / "t5_listed", additional_special_tokens=listed, eos_token="</s>", **t5)
    settings(root / "t5_added", **t5)
    (root / "t5_added" / "added_tokens.json").write_text(json.dumps({"<tool>": size + 100, "{": size + 101}))
    settings(root / "t5_white", **t5, **white(size + 100))
    settings(root / "xlm_roberta", tokenizer_class="XLMRobertaTokenizer")
    mask = {str(size + 1): {"content": "<mask>", "special": True, **FLAGS, "lstrip": True}}
    added = {"added_tokens_decoder": mask | white(size + 2)["added_tokens_decoder"]}
    settings(root / "xlm_white", tokenizer_class="XLMRobertaTokenizer", **added)
    (root / "xlm_family" / "config.json").write_text(json.dumps({"model_type": "xlm-roberta"}))


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_gives_what_transformers_gives(root, name, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(root / name))
    ours = vocabularies.load(str(root / name))
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
    assert ours.size == len(theirs)
    begin, end = theirs.bos_token_id, theirs.eos_token_id
    if name in ("bert", "cased", "bert_white"):
        begin, end = theirs.cls_token_id, theirs.sep_token_id
    assert (ours.bos_id, ours.eos_id) == (None if begin == end else begin, end)
    if ours.exact:
        for content, token in theirs.get_added_vocab().items():
            special = content in theirs.all_special_tokens or theirs.added_tokens_decoder[token].special
            assert ours.decode([token]) == ("" if special else content) or content == "<unk>"
    assert ("<tool>" in theirs.get_added_vocab()) == (name in ("qwen", "chatml", "legacy", "json", "t5_added"))
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
        assert not len(ids) or vocabulary.count_bytes([text], ids, lengths).sum() == len(text.encode()), text
    for text in (" ".join(corpus.SENTENCES * 9), " ".join(TEXTS)):
        parts = [part for part, _ in encode_long(vocabulary, text, size=30)]
        assert [token for part in parts for token in part.tolist()] == vocabulary.encode(text)
    assert len(parts) > 3 or "white" in name  # rstrip takes white space that the next part would begin with


def test_texts_with_added_tokens_come_back(root):
    for name in ("qwen", "json", "mistral", "chatml"):
        vocabulary = vocabularies.load(str(root / name))
        assert vocabulary.decode(vocabulary.encode("a<tool>b")) == "a<tool>b"
        assert vocabulary.eos_id not in vocabulary.encode("a<|im_end|></s>b")  # a special token in a text is text


LOSES = {  # what the start screen says of the first loss of each kind; "" for none
    "bert": "'Aa' becomes 'aa'",
    "cased": "'",
    "gpt2": "",
    "roberta": "",
    "qwen": "'e\\u0301' becomes '\\xe9'",
    "json": "",
    "llama": "' a' becomes 'a'",
    "llama/tokenizer.model": "",
    "code_llama": "' a' becomes 'a'",
    "t5": "'",
    "t5/spiece.model": "'",
    "gemma": "",
    "xlm_roberta": "'",
    "bytes": "",
    "train:bpe:300": "",
    "train:unigram:270": "",
    "train:sentencepiece:360": "",
}


@pytest.mark.parametrize("name", LOSES)
def test_the_start_screen_says_whether_a_tokenizer_is_lossless(root, name, tmp_path):
    source = corpus.write_jsonl(tmp_path / "a.jsonl", corpus.paragraphs(20))
    tokenizer = str(root / name) if (root / name).exists() else name
    data = corpus.opened(corpus.config(source=source, tokenizer=tokenizer, validation=""), tmp_path / "cache")
    shown = summary._data(data.describe(steps=1))["tokens"]
    data.close()
    said = f"not lossless ({LOSES[name]}" if LOSES[name] else "lossless)"
    assert said in shown and ("not lossless" in shown) == bool(LOSES[name])
    assert " becomes " in shown or not LOSES[name]


def test_added_tokens_that_take_white_space_lose_it(root):
    assert vocabularies.load(str(root / "gemma_white")).loses.startswith("'a <L> b<L>c' becomes")


def test_the_model_file_itself_loses_less_than_what_transformers_makes_of_it(root):
    model = vocabularies.load(str(root / "llama" / "tokenizer.model"))
    assert model.kind == "sentencepiece" and model.loses == ""
    assert model.decode(model.encode(" a")) == " a"


@pytest.mark.parametrize("name", NAMES)
def test_a_text_that_spells_special_tokens_is_text(root, name):
    vocabulary = vocabularies.load(str(root / name))
    ids = vocabulary.encode("a</s>b <s> <pad> <extra_id_0> <mask> <|endoftext|> [SEP] <S>")
    assert not {vocabulary.bos_id, vocabulary.eos_id} & {*ids}
    assert all(token < vocabulary.size - vocabulary.extra_ids for token in ids)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a.tiktoken": "IQ== 0\nIg== 1\n"}, r"a\.tiktoken: a tiktoken file is not supported; use the tokenizer\.json"),
        ({"tekken.json": TEKKEN}, r"tekken\.json: a tekken file is not supported; use the tokenizer\.json"),
        ({"tekken_240911.json": TEKKEN}, r"tekken_240911\.json: a tekken file is not supported"),
        ({"tokenizer.model": "IQ== 0\nIg== 1\n"}, r"tokenizer\.model: a tiktoken file is not supported"),
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
        (
            {"tokenizer_class": "AlbertTokenizer"},
            r"a AlbertTokenizer made of tokenizer.model is not supported .*known: Llama.*save_pretrained",
        ),
        ({"tokenizer_class": "T5Tokenizer"}, "a BPE model, and the T5Tokenizer that the files beside it name is a uni"),
        ({"eos_token": 7}, "eos_token should be a text, is 7"),
        (
            {"added_tokens_decoder": {"5": {"content": "x", "special": True}}},
            "added token 'x' should have the id 5, and transformers 5 gives it .*; save it again",
        ),
        (
            {"added_tokens_decoder": {"600": {"content": "<x>", "special": True}}},
            "should have the id 600, and tr.* 512",
        ),
        ({"added_tokens_decoder": {"512": {"content": 5}}}, "its added tokens are not"),
        ({"added_tokens_decoder": {"a": 3}}, "its added tokens are not"),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, change, expected):
    shutil.copy(STORIES / "tokenizer.model", tmp_path)
    settings(tmp_path, **{"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"} | change)
    with pytest.raises(UserError, match=expected) as caught:
        vocabularies.load(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"tokenizer_class": "XLMRobertaTokenizer"}, "a XLMRobertaTokenizer made of tokenizer.model is not supported"),
        ({"eos_token": "<nothing>"}, "names the token '<nothing>', which it lacks"),
        ({"added_tokens_decoder": {"5": {"content": "x", "special": True}}}, "its token 5 is .* add 'x'"),
        ({"added_tokens_decoder": {"512": {"content": "x", "rstrip": True}}}, "takes white space .*; give the folder"),
    ],
)
def test_settings_that_a_model_file_by_itself_does_not_fit_are_named(tmp_path, change, expected):
    shutil.copy(STORIES / "tokenizer.model", tmp_path)
    settings(tmp_path, **{"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"} | change)
    with pytest.raises(UserError, match=expected):
        vocabularies.load(str(tmp_path / "tokenizer.model"))


def test_sentinels_that_are_not_last_are_no_others(root):
    vocabulary = vocabularies.load(str(root / "t5_added"))
    with pytest.raises(UserError, match="<extra_id_0> of its own, and not as its last id"):
        vocabulary.with_extra_ids(100)
    assert vocabularies.load(str(root / "t5")).with_extra_ids(100).extra_ids == 100


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.tiktoken", "IQ== 0\nIg== 1\n", "tiktoken"),
        ("tokenizer.model", "IQ== 0\nIg== 1\n", "tiktoken"),  # as Llama 3's
        ("tekken.json", TEKKEN, "tekken"),
        ("other.json", TEKKEN, "tekken"),
    ],
)
def test_files_of_tiktoken_and_tekken_are_named(tmp_path, name, content, kind):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}: a {kind} file is not supported; use the tokenizer\.json"):
        vocabularies.load(str(tmp_path / name))
