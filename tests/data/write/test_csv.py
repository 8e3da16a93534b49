"""The separator of CSV: found by the header, or given; then it is a part of what a cache is of."""

import csv

import pytest

from t5x_like.core.errors import UsageError, UserError
from t5x_like.data import cache
from t5x_like.data.write import prepare
from tests.data import corpus
from tests.data.write.test_prepare import documents

ROWS = [("id", "text"), (1, "a, b; c | d\te^f"), (2, 'say "no"')]
TEXTS = [text for _, text in ROWS[1:]]


def write(path, separator, rows=ROWS):
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    return f"csv:{path}"


def read(config, folder):
    prepare.prepare(config, str(folder), report=None)
    return documents(config, folder)


@pytest.mark.parametrize("separator", ["\t", ";", "|", ","])
def test_the_separator_of_a_table_is_the_one_by_which_its_header_names_the_field(tmp_path, separator):
    assert read(corpus.config(source=write(tmp_path / "a.csv", separator)), tmp_path / "cache") == TEXTS


def test_of_a_tsv_with_one_column_commas_are_text(tmp_path):
    (tmp_path / "a.tsv").write_text("text\na, b\n")
    assert read(corpus.config(source=f"csv:{tmp_path}/a.tsv"), tmp_path / "cache") == ["a, b"]


@pytest.mark.parametrize(
    ("separator", "given"), [("^", "^"), (" ", " "), ("\t", "\t"), ("\t", "\\t"), ("\x01", "\x01")]
)
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_separator_may_be_given(tmp_path, name, separator, given):
    config = corpus.config(source=write(tmp_path / name, separator), csv_separator=given, validation="0.4")
    assert read(config, tmp_path / "cache") + documents(config, tmp_path / "cache", "validation") == TEXTS


def test_a_given_separator_goes_before_the_one_that_the_header_shows(tmp_path):
    """The header has the field by commas, and is one column by semicolons."""
    (tmp_path / "a.csv").write_text("text,id\n1;2,x\n")
    assert read(corpus.config(source=f"csv:{tmp_path}/a.csv"), tmp_path / "cache") == ["1;2"]
    with pytest.raises(UserError, match="a.csv:2 .*the row has 2 fields, the header 1"):
        read(corpus.config(source=f"csv:{tmp_path}/a.csv", csv_separator=";"), tmp_path / "cache")


def test_a_tokenizer_is_trained_on_the_text_between_the_given_separators(tmp_path):
    rows = [("text", "id"), *((text.replace("^", ""), "zebra " * 50) for text in corpus.paragraphs(60))]
    source = write(tmp_path / "a.csv", "^", rows)
    config = corpus.config(source=source, csv_separator="^", tokenizer="train:bpe:300")
    data = corpus.opened(config, tmp_path / "cache")
    assert len(data.vocabulary.encode("zebra")) > 2  # of 3000 zebras none was seen


def test_the_cache_of_a_given_separator_is_another_one_and_that_of_none_is_as_it_was(tmp_path):
    source = write(tmp_path / "a.csv", ",")
    made = {}
    for given in ("", ",", "\t", "\\t"):
        config = corpus.config(source=source, csv_separator=given, fields={"text": "id"} if given == "," else {})
        made[given] = cache.key(config)
    assert made["\t"] == made["\\t"] and len(set(made.values())) == 3
    plain = prepare.prepare(corpus.config(source=source), str(tmp_path / "cache"), report=None).manifest.train["train"]
    given = prepare.prepare(corpus.config(source=source, csv_separator=","), str(tmp_path / "cache"), report=None)
    assert given.manifest.train["train"].folder != plain.folder
    # Frozen: what older versions wrote for this file is found again.
    assert (
        plain.folder == "tokens-3ac85e13c9851000" and cache.key(corpus.config(source="csv:a.csv")) == "fc19112ab25877d3"
    )


@pytest.mark.parametrize("given", [",,", '"', "\n", "\\n", "tab", "\0"])
def test_what_is_no_separator_is_one_line(given):
    with pytest.raises(
        UsageError, match=r"^config.data.csv_separator=.* should be one character, such as .*$"
    ) as caught:
        corpus.config(source="csv:a.csv", csv_separator=given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["jsonl:a", "text:a.csv"])
def test_a_separator_without_csv_is_one_line(source):
    with pytest.raises(UsageError, match="csv_separator=';' is for csv: sources, and there is none; leave it empty"):
        corpus.config(source=source, csv_separator=";")


def test_one_source_of_several_is_enough():
    for given in ({"validation": "csv:b"}, {"source": "", "mixture": {"sources": {"x": "csv:b", "y": "text:c"}}}):
        assert corpus.config(**{"source": "text:a"} | given, csv_separator=";").separator == ";"
