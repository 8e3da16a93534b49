"""Sentinels that a run put behind its tokenizer (config.data.extra_ids) in a folder of Hugging Face."""

import pytest

from t5x_like.convert import tokenizers
from t5x_like.data.tokenizers import sentinels, tokenizer_training, vocabularies

TEXT = "Fill <extra_id_0> and <extra_id_1> here"
SIZES = {"bpe": 270, "sentencepiece": 280}


@pytest.mark.parametrize("kind", ["bytes", *SIZES])
def test_a_folder_of_hugging_face_names_the_sentinels(kind, tmp_path):
    transformers = pytest.importorskip("transformers", reason="beside transformers, of the extra [test]")
    texts = iter(["hello world this is a text with words and more words"] * 50)
    plain = tokenizer_training.train(kind, SIZES[kind], texts) if kind in SIZES else vocabularies.load("bytes")
    ours, (source, target) = plain.with_extra_ids(10), (tmp_path / "ours", tmp_path / "theirs")
    source.mkdir()
    target.mkdir()
    ours.save(str(source))
    tokenizers.write(str(source), str(target), name="t5")
    ids = sentinels.encode(ours, TEXT)
    assert ours.size - 1 in ids and ours.size - 2 in ids
    back, theirs = vocabularies.load(str(target)), transformers.AutoTokenizer.from_pretrained(target)
    assert (back.size, back.extra_ids, len(theirs)) == (ours.size, 10, ours.size)
    named = theirs.convert_tokens_to_ids([f"<extra_id_{number}>" for number in range(10)])
    assert named == [ours.size - 1 - number for number in range(10)]
    if kind != "sentencepiece":  # its T5Tokenizer has no bytes to fall back to, and puts no space behind a sentinel
        assert sentinels.encode(back, TEXT) == ids
        assert theirs(TEXT, add_special_tokens=False).input_ids == ids
