"""Config files and overrides: a mistake is one line with its place, and open sections take the keys of the run."""

import pathlib
import re

import pytest

from t5x_like.__main__ import COMMANDS, main
from t5x_like.core.errors import UsageError
from t5x_like.runs.arguments import Parser, call_function, load_config, override, split_config

TEST = "--config=configs/pretrain/test.py"
HEAD = "from ml_collections import ConfigDict\n\ndef get_config():\n    config = ConfigDict({'steps': 5, 'more': {}})\n"


@pytest.fixture
def written(tmp_path):
    def write(body, *, head=HEAD):
        path = tmp_path / "config.py"
        path.write_text(f"{head}    {body}\n    return config\n")
        return path

    return write


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("[][1]", "5: IndexError: list index out of range"),
        ("assert config.steps == 6, 'steps'", "5: AssertionError: steps"),
        ("raise RuntimeError('a\\n b')", "5: RuntimeError: a b"),
        ("1 / 0", "5: ZeroDivisionError: division by zero"),
        ("open('no/such.json')", "5: FileNotFoundError: [Errno 2] No such file or directory: 'no/such.json'"),
        ("import no_such_module", "5: ModuleNotFoundError: No module named 'no_such_module'"),
        ("config.stepz = 3; config.lock().q = 1", "5: AttributeError: "),
        ("config.steps = 'many'", "5: TypeError: "),
        ("config.update({'steps': 'many'})", "5: TypeError: "),
        ("{}['absent']", "5: KeyError: absent"),
        ("int('many')", "5: ValueError: invalid literal for int() with base 10: 'many'"),
        ("if config", "5: SyntaxError: expected ':'"),
    ],
)
def test_a_mistake_in_a_config_file_is_one_line_with_its_place(written, body, expected):
    path = written(body)
    with pytest.raises(UsageError) as raised:
        load_config([f"--config={path}"])
    text = str(raised.value)
    assert text.startswith(f"{path}:{expected}") and "\n" not in text and "Traceback" not in text
    assert raised.value.exit_status == 2


def test_an_argument_that_a_config_does_not_take_is_one_line():
    with pytest.raises(UsageError) as raised:
        load_config([f"{TEST}:foo"])
    text = str(raised.value)
    assert text == "configs/pretrain/test.py:12: TypeError: get_config() takes 0 positional arguments but 1 was given"


def test_a_config_that_takes_an_argument_gets_all_behind_the_first_colon(written):
    path = written("config.name = text", head=HEAD.replace("get_config()", "get_config(text)"))
    assert load_config([f"--config={path}:a:b"])[0]["name"] == "a:b"


def test_files_without_a_config_are_one_line(written, tmp_path):
    with pytest.raises(UsageError, match=r"should return a ConfigDict, not dict$"):
        load_config([f"--config={written('return {}')}"])
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UsageError, match=r"empty.py has no function get_config\(\)"):
        load_config([f"--config={tmp_path / 'empty.py'}"])


def test_a_value_that_is_computed_from_an_override(written):
    path = written(
        "config.part = config.get_ref('steps') // config.get_ref('parts')", head=HEAD.replace("{'s", "{'parts': 1, 's")
    )
    assert load_config([f"--config={path}", "--config.parts=2"])[0]["part"] == 2
    with pytest.raises(UsageError, match=rf"^{path}: ZeroDivisionError: [^\n]+$"):
        load_config([f"--config={path}", "--config.parts=0"])


NEW = {
    "--config.data.mixture.sources.a=text:x": ("data.mixture.sources.a", "text:x"),
    "--config.data.mixture.sources.b=12": ("data.mixture.sources.b", "12"),
    '--config.data.mixture.sources["a-b"]=text:y': ('data.mixture.sources["a-b"]', "text:y"),
    "--config.data.mixture.rates.a=2": ("data.mixture.rates.a", 2.0),
    "--config.runtime.compiler_options.cpu.xla_a=true": ("runtime.compiler_options.cpu.xla_a", True),
    "--config.runtime.compiler_options.gpu.xla_b=7": ("runtime.compiler_options.gpu.xla_b", 7),
    "--config.runtime.compiler_options.tpu.xla_c=text": ("runtime.compiler_options.tpu.xla_c", "text"),
}


def test_overrides_name_keys_of_open_sections_at_the_start_and_at_a_resume():
    plain, none = load_config([TEST])
    assert plain["data"]["mixture"]["sources"] == {} and none == {}
    for config, overrides in (load_config([TEST, *NEW]), override(plain, list(NEW))):
        assert overrides == dict(NEW.values())
        assert config["data"]["mixture"]["sources"] == {"a": "text:x", "b": "12", "a-b": "text:y"}
        rates = config["data"]["mixture"]["rates"]
        assert rates == {"a": 2.0} and type(rates["a"]) is float
        assert config["runtime"]["compiler_options"]["cpu"]["xla_a"] is True
        assert len(config["runtime"]["compiler_options"]["cpu"]) == 2  # beside the one of configs/common
        assert config["runtime"]["compiler_options"]["gpu"] == {"xla_b": 7}
        assert config["runtime"]["compiler_options"]["tpu"] == {"xla_c": "text"}


def test_a_resume_may_change_what_an_override_has_added():
    stored, _ = load_config([TEST, *NEW])
    stored["data"]["mixture"]["rates"]["a"] = 2  # as a config file may have it
    changed, overrides = override(stored, ["--config.data.mixture.rates.a=0.5", "--config.data.mixture.sources.a=c:d"])
    assert changed["data"]["mixture"]["rates"] == {"a": 0.5} == {"a": overrides["data.mixture.rates.a"]}
    assert list(changed["data"]["mixture"]["sources"].items())[0] == ("a", "c:d")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--config.optim.lr=3", "--config.optim.lr=3: config.optim.lr is unknown; known: adafactor, "),
        ("--config.loop.stepz=3", "--config.loop.stepz=3: config.loop.stepz is unknown; did you mean 'steps'?"),
        ("--config.data.mixture.sourcez.a=b", "config.data.mixture.sourcez is unknown; did you mean 'sources'?"),
        ("--config.data.mixture.sources.a.b=c", "config.data.mixture.sources.a is unknown"),
        (
            "--config.data.mixture.sources.a-b=c",
            """'data.mixture.sources.a-b' is no path; write '--config.data.mixture.sources["a-b"]=c'""",
        ),
        (
            '--config.data.mixture.sources["a.b"]=c',
            """the key 'a.b' has dots or blanks, which no key may have; write --config.data.mixture.sources["a_b"]=c""",
        ),
        ("--config.data.mixture.rates.a=b", "--config.data.mixture.rates.a=b: could not convert string to float"),
        ("--config.runtime.compiler_options.cpuz.a=1", "config.runtime.compiler_options.cpuz is unknown; did you"),
        ("--config.loop.steps=many", "--config.loop.steps=many: invalid literal for int()"),
        ("--config.loop.steps.a=1", "--config.loop.steps.a=1: "),
        ("--config.=1", "'' is no path"),
    ],
)
def test_a_wrong_override_is_one_line_at_the_start_and_at_a_resume(argument, expected):
    plain, _ = load_config([TEST])
    for call in (lambda: load_config([TEST, argument]), lambda: override(plain, [argument])):
        with pytest.raises(UsageError) as raised:
            call()
        assert expected in str(raised.value) and "\n" not in str(raised.value)
        assert plain["data"]["mixture"]["sources"] == {}


def test_split_config_takes_both_spellings():
    assert split_config(["--config", "a.py", "--workdir=w", "--config.b=1"]) == (
        ["--config=a.py", "--config.b=1"],
        ["--workdir=w"],
    )


@pytest.mark.parametrize("key", ["a-b", "a b", "1a", "a/b"])
def test_the_spelling_that_a_message_gives_works(key):
    with pytest.raises(UsageError, match="write '(.*)'$") as raised:
        load_config([TEST, f"--config.data.mixture.sources.{key}=text:x"])
    spelling = re.search("write '(.*)'$", str(raised.value))
    assert spelling and load_config([TEST, spelling[1]])[0]["data"]["mixture"]["sources"] == {
        key.replace(" ", "_"): "text:x"
    }


def test_an_override_that_is_given_twice_is_named():
    twice = ["--config.loop.steps=2", "--config.seed=1", "--config.loop.steps=3"]
    for call in (lambda: load_config([TEST, *twice]), lambda: override(load_config([TEST])[0], twice)):
        with pytest.raises(UsageError, match="^--config.loop.steps=2 and --config.loop.steps=3: an override is given"):
            call()
    assert load_config([TEST, *twice[:2], twice[0]])[1] == {"loop.steps": 2, "seed": 1}


@pytest.mark.parametrize("name", ["tiny", "pretrain/tiny", "configs/pretrain/tiny.py"])
def test_a_shipped_config_is_found_by_its_name_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, _ = load_config([f"--config={name}"])
    assert config["optim"]["name"] == "muon"
    text = pathlib.Path(config["data"]["source"].removeprefix("text:"))
    assert text.is_absolute() and text.read_text().startswith("First Citizen:")


def test_a_name_of_no_config_or_of_several_is_one_line():
    with pytest.raises(UsageError, match="^--config=tiney: there is no file tiney, .* did you mean 'tiny'\\?$"):
        load_config(["--config=tiney"])
    with pytest.raises(UsageError, match="several shipped configs; use distill/test or pretrain/test or rl/test$"):
        load_config(["--config=test"])


def test_shipped_configs_are_listed_by_names_that_each_mean_one():
    with pytest.raises(UsageError) as raised:
        load_config(["--config=zzz"])
    listed = str(raised.value).partition("known: ")[2].split(", ")
    assert len(listed) == len(set(listed)) > 10 and {"tiny", "lifecycle/dpo", "preference/dpo"} <= set(listed)
    for name in listed:
        load_config([f"--config={name}"])  # an error if it means several
    with pytest.raises(UsageError, match="did you mean 'lifecycle/dpo' or 'preference/dpo'\\?$"):
        load_config(["--config=dpoo"])


MISSPELT = {
    "train": (
        ["--config=tiny", "--workdirr=x"],
        "--workdirr=x: there is no flag --workdirr; did you mean '--workdir'?",
    ),
    "rl": (["--workdr", "x"], "--workdr: there is no flag --workdr; did you mean '--workdir'?"),
    "prepare": (["--confg.data.source=x", "--workdir=x"], "no flag --confg.data.source; did you mean '--config'?"),
    "plan": (["--config=tiny", "--topologie=v5e:2x4"], "no flag --topologie; did you mean '--topology'?"),
    "generate": (["--promt=x"], "there is no flag --promt; did you mean '--prompt'?"),
    "evaluate": (["--task=a", "--txt=b"], "--txt=b: there is no flag --txt; did you mean '--text'?"),
    "convert": (["a", "b", "--verfy"], "there is no flag --verfy; did you mean '--verify'?"),
    "export": (["-format=hf"], "-format=hf: there is no flag -format; did you mean '--format'?"),
    "inspect": (["--stepp=3"], "there is no flag --stepp; did you mean '--step'?"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_misspelt_flag_is_named_before_what_is_missing(command, capsys):
    arguments, expected = MISSPELT[command]
    assert main([command, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"t5x_like: t5x_like {command}: ") and line.endswith(expected), line


def test_what_argparse_takes_for_a_flag_or_a_value_stays_so():
    parser = Parser(prog="p")
    parser.add_argument("--prompt", action="append")
    parser.add_argument("--number", type=float)
    parser.add_argument("rest", nargs="*")
    options = parser.parse_args(["--pro=-x", "--number", "-3", "--prompt=--y", "-", "- a", "--", "--workdirr"])
    assert (options.prompt, options.number, options.rest) == (["-x", "--y"], -3, ["-", "- a", "--workdirr"])


def test_a_config_file_may_have_functions_beside_its_config(written):
    path = written("", head="def sweep(add):\n    add(1)\n    1 / 0\n\n" + HEAD)
    added = []
    with pytest.raises(UsageError, match=r":3: ZeroDivisionError: division by zero$"):
        call_function([f"--config={path}"], "sweep", added.append)
    assert added == [1]
    assert call_function([f"--config={path}"], "get_launch") == (False, None)
    assert call_function([f"--config={path}", "--config.steps=6"], "get_config")[1].steps == 5
