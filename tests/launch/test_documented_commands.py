"""Every command of a launcher in README.md, docs/launch.md and the launchers themselves makes a submission."""

import importlib
import re
import shlex

import pytest

from tests.launch.jobs import ROOT

TARGETS = ("local", "slurm", "gke", "xpk", "gcloud", "sky")
FILES = ("README.md", "docs/launch.md", *(f"launch/{target}.py" for target in TARGETS))
# In brackets stands what may be given; some exclude each other, so each is added alone.
BRACKETS = re.compile(r"\[([^]]*)\]")


def commands() -> list[tuple[str, str]]:
    """(file, command) of all, without brackets and then with each of them."""
    found = []
    for file in FILES:
        text = (ROOT / file).read_text().replace("\\\\\n", "\\\n").replace("\\\n", " ")
        for line in re.findall(rf"^ {{4}}python -m (launch\.(?:{'|'.join(TARGETS)}) .*)$", text, re.MULTILINE):
            found.append((file, BRACKETS.sub("", line)))
            optional = [each for each in BRACKETS.findall(line) if "dry_run" not in each]
            found += [(file, f"{BRACKETS.sub('', line)} {each}") for each in optional]
    return found


def test_each_target_has_its_command_in_the_docs():
    shown = {command.split()[0] for file, command in commands() if file == "docs/launch.md"}
    assert shown == {f"launch.{target}" for target in TARGETS if target != "xpk"}  # which is said to be as for gke


@pytest.mark.parametrize(("file", "command"), commands(), ids=lambda value: str(value)[-60:])
def test_a_command_is_taken(file, command, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    filled_in = re.sub(r"\b[A-Z]{3,}\b", lambda name: name[0].lower(), command.replace("=ZONE", "=us-east5-a"))
    module, *words = shlex.split(filled_in)
    checks = [] if module == "launch.local" else ["--no_check"]
    status = importlib.import_module(module).main(["--dry_run", *checks, *words])
    out = capsys.readouterr()
    assert (status, out.err) == (0, "")
    assert "--dry_run: nothing was" in out.out
    if "llama3_8b" in command:
        assert "--config.data.source=" in command and "--config.data.tokenizer=" in command
