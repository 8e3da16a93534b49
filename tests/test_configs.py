"""The shipped configs as they are resolved, word for word, in tests/golden: a default that moves shows in a review.

After a change that is meant, T5X_LIKE_UPDATE_GOLDEN=1 writes them anew.
"""

import importlib
import os
import pathlib

import pytest

from configs import common
from t5x_like.runs import train as experiments
from t5x_like.runs.functions import named_functions
from t5x_like.runs.rl_program import RlExperiment, prompt_room
from t5x_like.storage import paths
from t5x_like.storage.workdir import differences

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHIPPED = sorted(path.stem for path in (ROOT / "configs" / "pretrain").glob("*.py") if path.stem != "__init__")


def resolved(name: str) -> dict:
    """What `config.json` of a run of this config would hold."""
    module = importlib.import_module(f"configs.pretrain.{name}")
    return experiments.to_dict(experiments.from_config(module.get_config()))


@pytest.mark.parametrize("name", SHIPPED)
def test_resolved_configs_are_the_golden_ones(name):
    path = ROOT / "tests" / "golden" / f"config-{name}.json"
    if os.environ.get("T5X_LIKE_UPDATE_GOLDEN"):
        path.write_text(paths.json_text(resolved(name)))
    golden, now = paths.read_json(str(path)), paths.as_json(resolved(name))
    assert [str(change) for change in differences(golden, now)] == []


def test_a_config_that_was_stored_resolves_to_itself():
    for name in SHIPPED:
        stored = paths.as_json(resolved(name))
        assert paths.as_json(experiments.to_dict(experiments.from_config(stored))) == stored


def test_defaults_alone_are_a_sound_config():
    config = common.config()
    config.model.vocab_size = 259
    assert experiments.from_config(config).model.family == "llama"


OTHERS = sorted(
    f"{folder}.{path.stem}"
    for folder in ("distill", "instruct", "preference")
    for path in (ROOT / "configs" / folder).glob("*.py")
    if path.stem != "__init__"
)


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_shipped_configs_are_sound(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    section = experiments.from_config(config).data
    assert section.chats == (name.startswith("instruct.") and name != "instruct.llama3_8b_lora")
    assert section.answers_apart == ("t5" in name)


@pytest.mark.parametrize("name", ["llama3_8b_grpo", "reverse", "test"])
def test_the_shipped_configs_of_reinforcement_learning_are_sound(name):
    config = named_functions(importlib.import_module(f"configs.rl.{name}").get_config().to_dict())[0]
    experiment = experiments.built(RlExperiment, config)
    assert experiment.rl.answers % experiment.data.batch_size == 0
    assert prompt_room(experiment) > 0
