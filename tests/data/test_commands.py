"""`t5x_like prepare` and tools/train_tokenizer.py as they are called: what they print, and one line for a mistake."""

import importlib.util
import pathlib

import pytest

from t5x_like.__main__ import main
from t5x_like.core.terminal import format_bytes
from t5x_like.data.tokenizers import vocabularies
from t5x_like.storage import paths
from tests.data import corpus

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = """
from configs import common

def get_config():
    config = common.config()
    config.data.update({"tokenizer": "train:bpe:300", "validation": "0.1", "workers": 1})
    return config
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "config.py").write_text(CONFIG)
    return f"--config={tmp_path / 'config.py'}"


def test_prepare_prints_what_the_cache_holds(config, tmp_path, capsys):
    source = corpus.write_jsonl(tmp_path / "a.jsonl", corpus.paragraphs(40))
    arguments = ["prepare", config, f"--workdir={tmp_path / 'run'}", f"--config.data.source={source}"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "of 40 documents" in printed.out and "MB/s" in printed.out and "tokenizer-" in printed.out
    size = (tmp_path / "a.jsonl").stat().st_size * 9 // 10
    training = f"prepare: training a tokenizer of 300 tokens on up to {format_bytes(size)} of text ..."
    progress, rest = printed.err.splitlines()
    assert progress == training and rest.startswith("prepare: ")
    assert list((tmp_path / "run" / "cache").glob("prepared-*.json"))
    assert main(arguments) == 0
    again = capsys.readouterr()
    assert "all there already" in again.out and "all there already" not in printed.out and not again.err


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--config.data.source=text:missing.txt", "--workdir=W"], 1, "text:missing.txt: no such file"),
        (["--config.data.source=txt:README.md", "--workdir=W"], 2, "config.data.source='txt:README.md' should be"),
        (["--config.data.source=text:README.md"], 2, "give --workdir=DIR, or --config.data.cache=DIR"),
        (["--config.data.sauce=text:a", "--workdir=W"], 2, "sauce"),
        (["--config.data.source=text:README.md", "--workdir=W", "--check"], 2, "--check"),
    ],
)
def test_mistakes_are_one_line_and_a_status(config, tmp_path, capsys, arguments, status, expected):
    assert main(["prepare", config, *[text.replace("=W", f"={tmp_path}/w") for text in arguments]]) == status
    printed = capsys.readouterr()
    assert expected in printed.err and printed.err.count("\n") == 1 and not printed.out


def tool():
    path = ROOT / "tools" / "train_tokenizer.py"
    spec = importlib.util.spec_from_file_location("train_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_the_tool_trains_a_tokenizer_that_a_config_can_name(tmp_path, capsys):
    source = corpus.write_jsonl(tmp_path / "a.jsonl", corpus.paragraphs(60), field="body")
    folder = tmp_path / "tokenizer"
    status = tool()([source, "--kind=unigram", "--size=280", "--field=body", f"--output={folder}"])
    vocabulary = vocabularies.load(str(folder))
    assert status == 0 and vocabulary.size == 280 and vocabulary.fingerprint[:16] in capsys.readouterr().out


def test_the_tool_reads_and_writes_below_the_home_folder_and_in_a_bucket(tmp_path, monkeypatch, fake_gcs):
    monkeypatch.setenv("HOME", str(tmp_path))
    bucket = fake_gcs.bucket()
    corpus.write_jsonl(tmp_path / "a.jsonl", corpus.paragraphs(60))
    assert tool()(["jsonl:~/a.jsonl", "--size=280", "--output=~/made"]) == 0
    paths.copy_file(str(tmp_path / "a.jsonl"), f"{bucket}/a.jsonl")
    assert tool()([f"jsonl:{bucket}/a.jsonl", "--size=280", f"--output={bucket}/made/"]) == 0
    paths.copy_tree(f"{bucket}/made", str(tmp_path / "back"))
    found = {vocabularies.load(str(tmp_path / name)).fingerprint for name in ("made", "back")}
    assert len(found) == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["text:missing.txt"], "text:missing.txt: no such file"),
        (["text:README.md", "--kind=bep"], "did you mean 'bpe'"),
        (["text:README.md", "--size=100"], "at least 260"),
        (["text:README.md", "--bytes=0"], "--bytes=0"),
    ],
)
def test_the_tool_says_mistakes_in_one_line(tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(ROOT)
    assert tool()([*arguments, f"--output={tmp_path}"]) in (1, 2)
    printed = capsys.readouterr().err
    assert expected in printed and printed.count("\n") == 1
