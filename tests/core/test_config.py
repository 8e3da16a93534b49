"""Claims about the strict bridge from mappings to frozen dataclasses."""

import dataclasses
import json

import pytest
from ml_collections import ConfigDict

from t5x_like.core import config as bridge
from t5x_like.core.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float


@dataclasses.dataclass(frozen=True)
class Section:
    name: str
    length: int
    limit: float | None
    switch: bool
    rules: tuple[tuple[str, float | tuple[float, ...]], ...]
    inner: Inner
    options: dict[str, int]


GOOD = {
    "name": "x",
    "length": 3,
    "limit": None,
    "switch": True,
    "rules": (("a.*", 1.0), ("b", (0.0, 1.0))),
    "inner": {"rate": 1},
    "options": {"k": 1},
}


def test_a_config_dict_and_its_json_give_the_same_dataclass():
    built = bridge.build(Section, ConfigDict(GOOD), path="config.s")
    assert built.inner == Inner(1.0) and isinstance(built.inner.rate, float)
    again = bridge.build(Section, json.loads(json.dumps(bridge.to_dict(built))), path="config.s")
    assert again == built


@pytest.mark.parametrize(
    "change,message",
    [
        ({"lenght": 3}, r"config\.s\.lenght is unknown; did you mean 'length'\?"),
        ({"length": 3.5}, r"config\.s\.length=3\.5 should be a whole number"),
        ({"length": True}, r"config\.s\.length=True should be a whole number"),
        ({"switch": 1}, r"config\.s\.switch=1 should be True or False"),
        ({"name": None}, r"config\.s\.name=None should be a text"),
        ({"inner": 3}, r"config\.s\.inner=3 should be a section"),
        ({"inner": {"rate": "fast"}}, r"config\.s\.inner\.rate='fast' should be a number"),
        ({"rules": (("a", "b", "c"),)}, r"config\.s\.rules\[0\].* should have 2 entries"),
        ({"rules": "a"}, r"config\.s\.rules='a' should be a list"),
        ({"options": {"k": "v"}}, r"config\.s\.options\.k='v' should be a whole number"),
    ],
)
def test_a_wrong_value_is_named_with_its_path(change, message):
    with pytest.raises(UsageError, match=message):
        bridge.build(Section, GOOD | change, path="config.s")


def test_a_missing_field_is_named():
    with pytest.raises(UsageError, match=r"config\.s\.limit is missing"):
        bridge.build(Section, {key: value for key, value in GOOD.items() if key != "limit"}, path="config.s")
