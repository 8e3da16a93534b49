"""Numbers that a reference says of pairs: where they lie, what makes others of them, and what a reader gets."""

import numpy as np
import pytest

from t5x_like.core.errors import UserError
from t5x_like.data import reference_logp
from t5x_like.data.reference_logp import Store, about
from tests.data import corpus
from tests.data.read.test_sequences import PAIRS, pairs

ROWS = 10


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(reference_logp, "PART", 4)


def described(tokens="tokens", model="model", **given):
    model = {"fingerprint": model, "compute": "float32"}
    return about(corpus.config(features="pairs", **given), tokens=tokens, rows=ROWS, model=model)


def store(tmp_path, **given):
    return Store(described(**given), str(tmp_path / "cache"), beside=str(tmp_path / "beside"))


def filled(found):
    """Writes all that is missing; the numbers."""
    numbers = np.random.default_rng(0).normal(size=(ROWS, 2)).astype(np.float32)
    for part in found.missing():
        found.write(part, numbers[found.rows_of(part)])
    found.finish()
    return numbers


def test_parts_are_kept_and_come_back_in_order(tmp_path):
    first = store(tmp_path)
    assert first.missing() == [0, 1, 2] and len(first.rows_of(2)) == 2
    first.write(1, np.full((4, 2), 7, np.float32))
    with pytest.raises(UserError, match="are not complete"):
        first.read()
    second = store(tmp_path)
    assert second.missing() == [0, 2]
    second.write(1, np.full((4, 2), 8, np.float32))  # another run had made it by now
    numbers = filled(second)
    numbers[4:8] = 7
    assert np.array_equal(store(tmp_path).read(), numbers) and store(tmp_path).missing() == []
    assert not (tmp_path / "beside").exists()


def test_other_tokens_rows_or_models_have_numbers_of_their_own(tmp_path):
    filled(store(tmp_path))
    others = [{"tokens": "b"}, {"model": "b"}, {"length": 17}, {"encoder_length": 4}, {"truncate": corpus.END}]
    for given in others:
        assert store(tmp_path, **given).missing() == [0, 1, 2], given
    assert store(tmp_path, batch_size=3, workers=2).missing() == []


def test_a_damaged_part_is_one_line(tmp_path):
    filled(store(tmp_path))
    (path,) = (tmp_path / "cache").glob("reference-*/part-00001.f32")
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"part-00001\.f32: its sha256 is not the one in index\.json; delete") as caught:
        store(tmp_path).read()
    assert "\n" not in str(caught.value)


def test_what_is_no_number_is_refused(tmp_path):
    numbers = np.zeros((4, 2), np.float32)
    numbers[2, 1] = np.nan
    with pytest.raises(UserError, match="no finite log-probabilities for rows 4 to 7; check its parameters"):
        store(tmp_path).write(1, numbers)


def test_beside_a_cache_that_may_not_be_written(tmp_path, monkeypatch):
    """Parts that are there are read; else they lie in the run's own folder."""
    (tmp_path / "cache").mkdir()
    with monkeypatch.context() as patch:
        corpus.make_read_only(patch, tmp_path / "cache")
        numbers = filled(store(tmp_path))
        assert np.array_equal(store(tmp_path).read(), numbers)
    assert not list((tmp_path / "cache").iterdir()) and list((tmp_path / "beside").glob("reference-*/index.json"))
    filled(store(tmp_path, tokens="b"))
    corpus.make_read_only(monkeypatch, tmp_path / "cache")
    assert store(tmp_path, tokens="b").missing() == []


@pytest.mark.parametrize("encoder_length", [0, 20])
def test_a_pair_has_its_numbers_wherever_it_is_read(tmp_path, encoder_length):
    data = corpus.opened(pairs(tmp_path, encoder_length=encoder_length, batch_size=3), tmp_path / "cache")
    (component,) = data.components
    numbers = np.arange(2.0 * len(PAIRS), dtype=np.float32).reshape(-1, 2)
    assert not any(reference_logp.NAME in name for name in data.rows(0, np.arange(3)))
    component.reader.reference = numbers
    seen = set()
    for step in range(8):
        batch, places = data.rows(step, np.arange(3)), data.documents(step)
        alone = data.rows(step, np.array([2]))
        for place in places:
            document = offsets(component).index(place.offset)
            found = [batch[f"{side}/{reference_logp.NAME}"][place.row] for side in reference_logp.SIDES]
            assert found == numbers[document].tolist()
            seen.add(document)
        assert alone[f"chosen/{reference_logp.NAME}"][0] == batch[f"chosen/{reference_logp.NAME}"][2]
    assert len(seen) > 6


def offsets(component):
    """Of all documents in their file."""
    return [component.tokens.place(document)[1] for document in range(component.tokens.documents)]
