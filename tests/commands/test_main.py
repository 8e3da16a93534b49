"""What every command has in common: an interrupt is one line, and output fits the encoding of the terminal."""

import os
import subprocess
import sys
import types

import pytest

from t5x_like import __main__ as program
from t5x_like.commands import train_tokenizer
from t5x_like.core.errors import UsageError


@pytest.mark.parametrize("command", program.COMMANDS)
def test_an_interrupt_is_one_line_and_status_130(command, monkeypatch, capsys):
    def run(_arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, f"t5x_like.commands.{command}", types.SimpleNamespace(run=run))
    monkeypatch.setattr(program.importlib, "import_module", sys.modules.__getitem__)
    assert program.main([command]) == 130
    printed = capsys.readouterr()
    assert printed.err == "t5x_like: interrupted\n" and not printed.out


def test_text_that_the_encoding_of_the_output_lacks_is_replaced():
    code = """
import sys, types
text = "caf\\u00e9 \\ufffd"
sys.modules["t5x_like.commands.inspect"] = types.SimpleNamespace(run=lambda _: print(text) or 0)
from t5x_like.__main__ import main
sys.argv = ["t5x_like", "inspect"]
sys.exit(main())
"""
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "caf\u00e9 ?\n".encode("latin-1"), b"")


def test_a_tokenizer_is_not_trained_for_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="file is no folder; name another"):
            # The source is not there: it would be the next complaint.
            train_tokenizer.run(["text:no/such/file.txt", f"--output={output}"])
    assert (tmp_path / "file").read_text() == "mine"
