"""A text that is encoded in parts has the ids of the whole text, for every kind of vocabulary."""

import json
import pathlib
import shutil

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from t5x_like.data.tokenizers import long_texts, tokenizer_training, vocabularies
from tests.data import corpus

STORIES = pathlib.Path(__file__).parents[1] / "stories260K"
TRAINED = {"bpe": 400, "unigram": 270, "sentencepiece": 360}
MODELS = {  # of SentencePiece's trainer
    "t5": {},
    "no_dummy": {"add_dummy_prefix": False, "byte_fallback": True, "vocab_size": 360},
    "keeps_spaces": {"remove_extra_whitespaces": False, "vocab_size": 150},
    "sp_bpe": {"model_type": "bpe", "vocab_size": 150},
    "over_words": {"split_by_whitespace": False, "vocab_size": 300},
    "after": {"treat_whitespace_as_suffix": True, "vocab_size": 150},
}
NAMES = ("bytes", *TRAINED, *MODELS, "llama_json", "llama_model", "nfc", "bert", "metaspace")
WORDS = st.sampled_from(
    [*"abc019.,'\u00e9\u0301\u3042\u732b\u2581\U0001f600\ufb01\u00a8", "fox", "lazy dog", "don't", "x\u0301", "</s>"]
)
SPACES = st.sampled_from(["", " ", " ", "\n", "  ", "\n\n", "\t", "\r\n", " \n", "\u3000", "\u00a0"])


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    for kind, size in TRAINED.items():
        tokenizer_training.train(kind, size, corpus.paragraphs(40)).save(str(root / kind))
    lines = [line for text in corpus.paragraphs(40) for line in text.split("\n")]
    for name, settings in MODELS.items():
        given = {"vocab_size": 120, "hard_vocab_limit": False, "minloglevel": 2} | settings
        if name == "sp_bpe":
            del given["hard_vocab_limit"]
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_prefix=str(root / name), num_threads=1, **given
        )
    shutil.copy(STORIES / "tokenizer.json", root / "llama_json.json")
    shutil.copy(STORIES / "tokenizer.model", root / "llama_model.model")
    layout = json.loads((root / "bpe" / "tokenizer.json").read_text())
    (root / "nfc.json").write_text(json.dumps(layout | {"normalizer": {"type": "NFC"}}))
    write_others(root, lines)
    places = {path.stem: path for path in [*root.glob("*.model"), *root.glob("*.json")]} | {
        kind: root / kind for kind in TRAINED
    }
    loaded = {name: vocabularies.load(str(places.get(name, name))) for name in NAMES}
    return loaded.__getitem__


def write_others(root, lines):
    """A WordPiece as BERT's, and a unigram that is divided before each space."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    bert = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    bert.normalizer, bert.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    bert.train_from_iterator(lines, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special))
    bert.save(str(root / "bert.json"))
    pieces = [
        ("<unk>", 0.0),
        ("</s>", 0.0),
        ("\u2581", -2.0),
        *((c, -3.0) for c in sorted(set("".join(lines)) - {" "})),
    ]
    divided = Tokenizer(models.Unigram([*pieces, ("\u2581fox", -4.0), ("\u2581lazy", -4.0)], unk_id=0))
    divided.pre_tokenizer = pre_tokenizers.Metaspace()
    divided.save(str(root / "metaspace.json"))


def in_parts(vocabulary, text, size, whole=0):
    """(ids, bytes of each, number of parts)"""
    parts = [*long_texts.encode(vocabulary, text, size=size, whole=whole)]
    ids, counts = (np.concatenate([np.zeros(0, int), *column]) for column in zip(*parts, strict=True))
    return ids.tolist(), counts, len(parts)


@pytest.mark.parametrize("name", NAMES)
def test_parts_have_the_ids_of_the_whole_text(load, name):
    vocabulary = load(name)

    @hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
    @hypothesis.given(st.lists(st.tuples(WORDS, SPACES), min_size=1, max_size=40), st.integers(1, 20))
    def check(pieces, size):
        text = "".join(word + space for word, space in pieces)
        ids, counts, _ = in_parts(vocabulary, text, size)
        assert ids == vocabulary.encode(text)
        if ids:
            assert counts.sum() == len(text.encode())

    check()


@pytest.mark.parametrize("name", NAMES)
def test_prose_is_cut(load, name):
    """Behind words, or between lines: but with tokens of several words, or spaces behind words, which are whole."""
    text = " ".join(corpus.paragraphs(30)) + "\n" + "\n".join(corpus.paragraphs(30))
    ids, counts, parts = in_parts(load(name), text, 100)
    assert ids == load(name).encode(text) and counts.sum() == len(text.encode())
    least = {"over_words": 1, "after": 1}.get(name, 12)
    assert parts >= least


@pytest.mark.parametrize("name", ["sentencepiece", "llama_model", "t5", "no_dummy"])
def test_no_part_gains_a_space(load, name):
    """The smallest case: lines, each longer than a part."""
    vocabulary, text = load(name), "one long line\n" * 20
    assert vocabulary.decode(in_parts(vocabulary, text, 10)[0]) == vocabulary.decode(vocabulary.encode(text))
    assert in_parts(vocabulary, text, 10)[2] > 10


def test_a_tokenizer_that_looks_over_the_places_gets_whole_texts(tmp_path, load):
    layout = {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a b"}, "behavior": "Isolated", "invert": False}}
    for change in (layout, {"normalizer": {"type": "Replace", "pattern": {"String": "a b"}, "content": "c"}}):
        made = tokenizer_training.train("bpe", 300, corpus.paragraphs(10))
        made.save(str(tmp_path / "made"))
        whole = json.loads((tmp_path / "made" / "tokenizer.json").read_text()) | change
        (tmp_path / "odd.json").write_text(json.dumps(whole))
        assert in_parts(vocabularies.load(str(tmp_path / "odd.json")), "a b " * 50, 10)[2] == 1


def unigram_of_near_ties(path):
    """A SentencePiece model in which "ab" is better as two pieces by less than a float32 of 30,000 can show."""
    proto = sentencepiece_model_pb2.ModelProto()
    scores = {"\u2581": -2.0, "\u2581x": -10.25, "a": -4.0, "b": -4.0, "ab": -8.00006}
    for piece, score, kind in (
        ("<unk>", 0.0, 2),
        ("<s>", 0.0, 3),
        ("</s>", 0.0, 3),
        *((*one, 1) for one in scores.items()),
    ):
        proto.pieces.add(piece=piece, score=score, type=kind)
    proto.trainer_spec.model_type = 1
    proto.normalizer_spec.name = "identity"
    path.write_bytes(proto.SerializeToString())
    return vocabularies.load(str(path))


def test_near_ties_far_from_the_begin_are_as_in_the_whole_text(tmp_path):
    """The sum of scores so far decides what float32 shows of a difference, so only the whole text has its ids."""
    vocabulary = unigram_of_near_ties(tmp_path / "near.model")
    text = "x " * 3000 + "ab x ab"
    whole = vocabulary.encode(text)
    ids, counts, parts = in_parts(vocabulary, text, 100, whole=len(text))
    assert (ids, parts) == (whole, 1) and counts.sum() == len(text)
    assert vocabulary.encode("ab")[-2:] == [5, 6] and whole[-1] == 7  # two pieces near the begin, one far from it
    assert in_parts(vocabulary, text, 100, whole=0)[0] != whole  # which parts do not show
    assert vocabulary.rounds and long_texts.WHOLE > len(text)


@pytest.mark.parametrize("name", NAMES)
def test_only_a_unigram_that_nothing_divides_rounds(load, name):
    assert load(name).rounds == (name in {"sentencepiece", *MODELS} - {"sp_bpe"})


def test_a_unigram_of_float64_scores_rounds_unless_words_are_divided(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    for score, divided, rounds in ((-2.5, False, False), (-2.1, False, True), (-2.1, True, False)):
        made = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", score), ("b", -3.0)], unk_id=0))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit() if divided else pre_tokenizers.Digits()
        made.save(str(tmp_path / "made.json"))
        assert vocabularies.load(str(tmp_path / "made.json")).rounds == rounds
