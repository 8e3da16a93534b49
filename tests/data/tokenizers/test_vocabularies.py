"""What every vocabulary promises: exact byte counts, texts that come back, and a folder that another process reads."""

import json
import pathlib
import shutil

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import sentencepiece

from t5x_like.core.errors import UserError
from t5x_like.data.tokenizers import tokenizer_training, vocabularies
from tests.data import corpus

STORIES = pathlib.Path(__file__).parents[1] / "stories260K"
TEXTS = (*corpus.SENTENCES, "  two leading spaces", " ", "\n\n\n", "a</s><s><|endoftext|>b", "x", "\U0001f600" * 5)
LOSSLESS = ("bytes", "bpe", "unigram", "sentencepiece", "llama")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder per vocabulary: all kinds that are trained here, and two that change the text they encode."""
    root = tmp_path_factory.mktemp("vocabularies")
    for kind, size in (("bpe", 400), ("unigram", 270), ("sentencepiece", 360)):
        tokenizer_training.train(kind, size, corpus.paragraphs(40)).save(str(root / kind))
    vocabularies.load("bytes").save(str(root / "bytes"))
    shutil.copytree(STORIES, root / "llama")  # the plain form of a Llama tokenizer.json
    lines = iter([line for text in corpus.paragraphs(40) for line in text.split("\n")])
    sentencepiece.SentencePieceTrainer.train(  # NFKC, doubled spaces removed, unknown pieces: as T5's
        sentence_iterator=lines, model_prefix=str(root / "t5"), vocab_size=120, hard_vocab_limit=False, minloglevel=2
    )
    (root / "nfc").mkdir()
    layout = json.loads((root / "bpe" / "tokenizer.json").read_text()) | {"normalizer": {"type": "NFC"}}
    (root / "nfc" / "tokenizer.json").write_text(json.dumps(layout))
    return root


def load(folder, name):
    return vocabularies.load(str(folder / ("t5.model" if name == "t5" else name)))


def split(vocabulary, texts):
    """[(ids, byte counts)] of each text."""
    ids, lengths = vocabulary.encode_batch(texts)
    counts = vocabulary.count_bytes(texts, ids, lengths)
    edges = np.cumsum(lengths)[:-1]
    return list(zip(np.split(ids, edges), np.split(counts, edges), strict=True))


@pytest.mark.parametrize("name", [*LOSSLESS, "t5", "nfc"])
def test_byte_counts_add_up_to_the_text_whatever_the_tokenizer(folder, name):
    for text, (ids, counts) in zip(TEXTS, split(load(folder, name), TEXTS), strict=True):
        if len(ids):  # t5 has no token for white space alone
            assert counts.sum() == len(text.encode()) and counts.min() >= 0, text


@pytest.mark.parametrize("name", LOSSLESS)
def test_each_token_counts_the_bytes_it_stands_for(folder, name):
    vocabulary = load(folder, name)
    for text, (ids, counts) in zip(TEXTS, split(vocabulary, TEXTS), strict=True):
        surfaces = [vocabulary.decode_bytes([token]) for token in ids]
        added = vocabulary.adds_space
        assert [len(s) for s in surfaces] == (counts + ([1] + [0] * (len(ids) - 1) if added else 0)).tolist()
        assert b"".join(surfaces) == (b" " if added else b"") + text.encode()
    assert any(count > 1 for _, counts in split(vocabulary, TEXTS) for count in counts) or name == "bytes"


@pytest.mark.parametrize("name", ["bpe", "llama"])
def test_characters_that_are_divided_among_tokens_are_among_the_texts(folder, name):
    vocabulary = load(folder, name)
    halves = [t for ids, _ in split(vocabulary, TEXTS) for t in ids if "\ufffd" in vocabulary.decode([t])]
    assert halves


@pytest.mark.parametrize("name", LOSSLESS)
def test_any_text_comes_back(folder, name):
    vocabulary = load(folder, name)

    @hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
    @hypothesis.given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581\x00"), max_size=40))
    def check(text):
        [(ids, counts)] = split(vocabulary, [text])
        assert vocabulary.decode(ids) == text and counts.sum() == len(text.encode())
        assert vocabulary.encode(text) == ids.tolist()

    check()


@pytest.mark.parametrize("name", LOSSLESS)
def test_bytes_of_a_continuation_can_be_streamed(folder, name):
    vocabulary = load(folder, name)
    ids = vocabulary.encode(TEXTS[4])
    parts = [vocabulary.decode_bytes(ids[:3]), *(vocabulary.decode_bytes([token]) for token in ids[3:])]
    assert b"".join(parts) == vocabulary.decode_bytes(ids)


@pytest.mark.parametrize("name", [*LOSSLESS, "t5"])
def test_a_saved_folder_holds_the_same_vocabulary(folder, tmp_path, name):
    vocabulary = load(folder, name)
    vocabulary.save(str(tmp_path / "tokenizer"))
    again = vocabularies.load(str(tmp_path / "tokenizer"))
    facts = [(v.size, v.bos_id, v.eos_id, v.fingerprint, v.encode(TEXTS[0])) for v in (vocabulary, again)]
    assert facts[0] == facts[1]


def test_special_tokens_written_out_in_a_text_are_text(folder):
    vocabulary = load(folder, "bpe")
    assert vocabulary.eos_id is not None and vocabulary.eos_id not in vocabulary.encode("a<|endoftext|>b")
    assert vocabulary.encode("a", eos=True)[-1] == vocabulary.eos_id


def test_begin_and_end_are_those_the_file_names(folder):
    llama, own = load(folder, "llama"), load(folder, "bpe")
    assert (llama.bos_id, llama.eos_id) == (1, 2) and (own.bos_id, own.eos_id) == (None, 0)
    assert llama.encode("a", bos=True, eos=True)[:: len(llama.encode("a")) + 1] == [1, 2]


def test_one_token_for_begin_and_end_separates_documents_once(folder, tmp_path):
    shutil.copy(folder / "bpe" / "tokenizer.json", tmp_path)
    names = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|endoftext|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    vocabulary = vocabularies.load(str(tmp_path))
    assert (vocabulary.bos_id, vocabulary.eos_id) == (None, 0)


def test_fingerprints_differ_between_tokenizers(folder):
    assert len({load(folder, name).fingerprint for name in (*LOSSLESS, "t5")}) == len(LOSSLESS) + 1


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("missing.json", None, "no such file"),
        ("half.json", b'{"model":', "not a tokenizer.json"),
        ("other.json", b'{"a": 1}', "not a tokenizer.json"),
        ("noise.model", b"\x00\x01noise", "not a SentencePiece model"),
        ("empty.model", b"", "not a SentencePiece model"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_named_in_one_line(tmp_path, name, content, expected):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=expected) as caught:
        vocabularies.load(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_a_changed_file_in_a_saved_folder_is_found(folder, tmp_path):
    shutil.copytree(folder / "bpe", tmp_path / "copy")
    with open(tmp_path / "copy" / "tokenizer.json", "ab") as file:
        file.write(b" ")
    with pytest.raises(UserError, match="sha256"):
        vocabularies.load(str(tmp_path / "copy"))


@pytest.mark.parametrize("kind", ["bytes", "bpe", "unigram", "sentencepiece"])
def test_sentinels_are_the_last_ids_of_any_tokenizer_and_are_kept(folder, kind, tmp_path):
    text, plain = corpus.paragraphs(4)[3], load(folder, kind)
    more = plain.with_extra_ids(100)
    assert (more.size, more.extra_ids, plain.extra_ids) == (plain.size + 100, 100, 0)
    assert more.fingerprint != plain.fingerprint and (more.bos_id, more.eos_id) == (plain.bos_id, plain.eos_id)
    more.save(str(tmp_path))
    again = vocabularies.load(str(tmp_path))
    assert (again.fingerprint, again.size, again.extra_ids) == (more.fingerprint, more.size, 100)
    ids = again.encode(text)
    assert ids == plain.encode(text)
    assert again.decode([again.size - 1, *ids, again.size - 100]) == text
    with pytest.raises(UserError, match="has 100 extra ids of its own, not 7"):
        again.with_extra_ids(7)


def test_sentinels_that_a_tokenizer_json_names_are_counted(folder, tmp_path):
    layout = json.loads((folder / "bpe" / "tokenizer.json").read_text())
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    layout["added_tokens"] += [{"id": 400 + i, "content": f"<extra_id_{4 - i}>", **token} for i in range(5)]
    (tmp_path / "named.json").write_text(json.dumps(layout))
    named = vocabularies.load(str(tmp_path / "named.json"))
    assert (named.size, named.extra_ids) == (405, 5)
    assert named.decode([404, *named.encode("word")]) == "word"
