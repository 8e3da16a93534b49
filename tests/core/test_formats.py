"""Stored configs of every format are read; what a format changed is data, and a newer format is refused in one line."""

import pytest

from t5x_like.core import formats
from t5x_like.core.errors import UserError
from t5x_like.core.formats import Change

TABLE = {
    2: (
        Change(moves={"model.width": "model.decoder.width", "a": "b", "b": "a"}, drops=("old",)),
        Change(where={"model.family": "gpt2"}, adds={"model.decoder.bias": True}),
        Change(adds={"model.decoder.bias": False, "model.encoder": None, "optim.lion.b3": 0.5}),
    ),
    3: (Change(moves={"model.decoder": "model.stack"}, adds={"new": {"rate": 1.0}}),),
}


def test_a_config_of_format_1_goes_through_every_format():
    config = {"model": {"family": "gpt2", "width": 8}, "a": 1, "b": 2, "old": {"x": 1}, "optim": {"name": "sgd"}}
    before = repr(config)
    assert formats.upgrade(config, where="config.json", table=TABLE) == {
        "model": {"family": "gpt2", "stack": {"width": 8, "bias": True}, "encoder": None},
        "a": 2,
        "b": 1,
        "optim": {"name": "sgd"},  # a variant that is not there gets no field
        "new": {"rate": 1.0},
    }
    assert repr(config) == before


def test_a_change_for_one_family_leaves_the_others():
    config = {"model": {"family": "llama", "width": 8}}
    assert formats.upgrade(config, where="", table=TABLE)["model"]["stack"] == {"width": 8, "bias": False}


def test_a_config_of_a_later_format_is_changed_by_later_formats_alone():
    config = {"format": 2, "a": 1, "b": 2, "model": {"decoder": {}}}
    upgraded = formats.upgrade(config, where="", table=TABLE)
    assert upgraded == {"a": 1, "b": 2, "model": {"stack": {}}, "new": {"rate": 1.0}}


def test_what_is_written_now_is_read_as_it_is():
    config = {"loop": {"steps": 3}}
    assert formats.upgrade(formats.stored(config), where="") == config
    assert sorted(formats.TABLE) == list(range(2, formats.FORMAT + 1))


def test_the_separator_of_csv_was_found_before_it_could_be_given():
    for before in (1, 2, 3):
        assert formats.upgrade({"format": before, "data": {}}, where="")["data"]["csv_separator"] == ""
    given = {"format": 4, "data": {"csv_separator": ";"}}
    assert formats.upgrade(given, where="")["data"]["csv_separator"] == ";"


def test_answers_were_drawn_with_sharded_weights_before_they_could_be_gathered():
    old = {"format": 4, "rl": {"rows": 0}}
    assert formats.upgrade(old, where="")["rl"] == {"rows": 0, "weights": "sharded", "answers_per_row": 1}
    assert "rl" not in formats.upgrade({"format": 4, "loop": {}}, where="")


def test_each_answer_had_a_row_of_its_own_before_they_could_share_a_prompt():
    assert formats.upgrade({"format": 5, "rl": {"rows": 0}}, where="") == {"rl": {"rows": 0, "answers_per_row": 1}}


def test_the_flat_scaling_of_rotary_positions_becomes_the_named_variant():
    numbers = {"factor": 8.0, "low_frequency": 1.0, "high_frequency": 4.0, "original_length": 8192}

    def upgraded(name):
        config = {"model": {"rope": {"theta": [1e4], "scaling": {"name": name, **numbers}}}}
        return formats.upgrade(config, where="")["model"]["decoder"]["rope"]

    assert upgraded("llama3") == {"theta": [1e4], "scaling": {"name": "llama3", "llama3": numbers}}
    assert upgraded("none") == {"theta": [1e4], "scaling": {"name": "none"}}


@pytest.mark.parametrize(
    ("found", "message"), [(99, "is of format 99, and this program knows up to"), ("2", "damaged"), (0, "damaged")]
)
def test_a_format_that_is_not_known_is_one_line(found, message):
    with pytest.raises(UserError, match=f"^config.json .*{message}[^\n]*$"):
        formats.upgrade({"format": found}, where="config.json")


def test_no_layers_lay_on_stages_before_they_could():
    old = {"format": 6, "mesh": {"fsdp": -1}}
    assert formats.upgrade(old, where="")["mesh"] == {"fsdp": -1, "pipeline": {"micro_batches": None, "repeats": 1}}
