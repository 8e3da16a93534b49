"""What the `datasets` package itself saves is read: shards, splits, nested, null and odd columns, its caches."""

import datasets
import pytest

from t5x_like.core.errors import UserError
from t5x_like.data.write import prepare
from tests.data import corpus
from tests.data.write.test_prepare import documents

TEXTS = [text.replace("\n", " ") for text in corpus.paragraphs(30)]
TEXT, LARGE = datasets.Value("string"), datasets.Value("large_string")


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def read(folder, tmp_path, **given):
    config = corpus.config(source=f"arrow:{folder}", **given)
    done = prepare.prepare(config, str(tmp_path / "cache"), report=None)
    return documents(config, tmp_path / "cache"), done


def saved(tmp_path, columns, **options):
    folder = tmp_path / "saved"
    datasets.Dataset.from_dict(columns, features=options.pop("features", None)).save_to_disk(str(folder), **options)
    return folder


@pytest.mark.parametrize("shards", [1, 4])
def test_the_shards_of_a_dataset_are_read_in_their_order(tmp_path, shards):
    folder = saved(tmp_path, {"id": range(30), "text": TEXTS}, num_shards=shards)
    assert len(list(folder.glob("*.arrow"))) == shards
    assert read(folder, tmp_path)[0] == TEXTS


def test_rows_that_were_chosen_and_shuffled_are_those_that_are_read(tmp_path):
    chosen = datasets.Dataset.from_dict({"text": TEXTS}).shuffle(seed=0).select(range(9))
    chosen.save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved", tmp_path)[0] == list(chosen["text"]) != TEXTS[:9]


def test_a_split_of_several_is_named(tmp_path):
    splits = {"train": TEXTS[:20], "test": TEXTS[20:]}
    both = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": rows}) for name, rows in splits.items()})
    both.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match="holds the splits train, test; give .*/saved/SPLIT"):
        read(tmp_path / "saved", tmp_path)
    config = corpus.config(source=f"arrow:{tmp_path}/saved/train", validation=f"arrow:{tmp_path}/saved/test")
    prepare.prepare(config, str(tmp_path / "cache"), report=None)
    for name, part in (("train", "train"), ("validation", "test")):
        assert documents(config, tmp_path / "cache", name) == splits[part]


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "binary", "large_binary"])
def test_every_type_of_text_is_text(tmp_path, kind):
    texts = [text.encode() for text in TEXTS] if "binary" in kind else TEXTS
    folder = saved(tmp_path, {"text": texts}, features=datasets.Features(text=datasets.Value(kind)))
    assert read(folder, tmp_path)[0] == TEXTS


def test_a_field_within_others_is_read_alone(tmp_path):
    """Beside it stand what is no UTF-8 and a time that Python does not have, which nobody asked for."""
    import pyarrow

    inner = {
        "text": pyarrow.array(TEXTS),
        "raw": pyarrow.array([b"\xff"] * 30, pyarrow.binary()).view(pyarrow.string()),
        "when": pyarrow.array([1] * 30, pyarrow.timestamp("ns")),
        "list": pyarrow.array([[{"a": 1}]] * 30),
    }
    deep = pyarrow.StructArray.from_arrays(list(inner.values()), list(inner))
    table = pyarrow.table({"doc": pyarrow.StructArray.from_arrays([deep], ["deep"]), "id": list(range(30))})
    datasets.Dataset(table).save_to_disk(str(tmp_path / "saved"), num_shards=2)
    assert read(tmp_path / "saved", tmp_path, fields={"text": "doc.deep.text"})[0] == TEXTS
    with pytest.raises(UserError, match=r"record 0: no field 'doc.deep.no' among doc, id"):
        read(tmp_path / "saved", tmp_path, fields={"text": "doc.deep.no"})


@pytest.mark.parametrize("field", ["text", "doc.text"])
def test_a_null_is_a_bad_record(tmp_path, field):
    rows = [{"text": text, "doc": {"text": text}} for text in TEXTS]
    rows[3:3] = [{"text": None, "doc": None}, {"text": None, "doc": {"text": None}}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"), num_shards=2)
    with pytest.raises(UserError, match=rf"data-00000-of-00002.arrow: record 3: field '{field}' .*, is null; mend it"):
        read(tmp_path / "saved", tmp_path, fields={"text": field})
    given = {"fields": {"text": field}, "on_bad_record": "skip", "max_bad_share": 0.1}
    texts, done = read(tmp_path / "saved", tmp_path, **given)
    assert texts == TEXTS and done.bad == 2 and "record 4: " in done.bad_places[1]


def test_a_column_of_nulls_alone_is_one_line(tmp_path):
    with pytest.raises(UserError, match="record 0: field 'text' should be a text, is null"):
        read(saved(tmp_path, {"text": [None, None]}), tmp_path)


def test_a_dataset_without_rows_is_one_line(tmp_path):
    with pytest.raises(UserError, match="config.data.source=arrow:.*holds a dataset without rows"):
        read(saved(tmp_path, {"text": []}), tmp_path)


def test_classes_are_labels(tmp_path):
    folder = tmp_path / "saved"
    names = datasets.ClassLabel(names=["bad", "good"])
    plain = datasets.Dataset.from_dict({"text": TEXTS, "label": [index % 2 for index in range(30)]})
    plain.cast_column("label", names).save_to_disk(str(folder))
    given = {"fields": {"label": "label"}, "features": "labels", "packing": "single", "length": 400}
    data = corpus.opened(corpus.config(source=f"arrow:{folder}", **given), tmp_path / "cache")
    assert data.rows(0, range(4))["labels"].max() == 1 and read(folder, tmp_path)[0] == TEXTS


def test_the_cache_of_a_dataset_is_a_folder_of_streams(tmp_path):
    """As `load_dataset` and `from_generator` leave it; no state.json tells the files."""
    made = datasets.Dataset.from_generator(lambda: ({"text": text} for text in TEXTS), cache_dir=str(tmp_path / "made"))
    [file] = made.cache_files
    assert read(file["filename"].rpartition("/")[0], tmp_path)[0] == list(made["text"]) == TEXTS
