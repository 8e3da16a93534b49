"""The parameters of each family, word for word: path, shape, axes and initializer, in tests/golden.

After a change that is meant, T5X_LIKE_UPDATE_GOLDEN=1 writes them anew.
"""

import os
import pathlib

import pytest

from t5x_like.core import tree
from t5x_like.core.types import ParamSpec
from t5x_like.models.families import FAMILIES
from tests.models import cases

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def text(model) -> str:
    lines = []
    for path, spec in tree.leaves(model.specs()):
        shape = "x".join(str(dim) for dim in spec.shape)
        axes = ",".join(axis or "-" for axis in spec.axes)
        lines.append(f"{path:26} {shape:16} {axes:32} {spec.dtype} {spec.init}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", ["llama-tiny", "llama-8b", "gpt2-tiny", "gpt2-small", "t5-tiny", "t5-1_1_small"])
def test_parameter_specs_are_the_golden_ones(name):
    family, size = name.split("-")
    model = cases.sized(family, size)
    path = GOLDEN / f"specs-{name}.txt"
    if os.environ.get("T5X_LIKE_UPDATE_GOLDEN"):
        path.write_text(text(model))
    assert text(model) == path.read_text()


# Published numbers of parameters: the papers' and model cards' rounded figures, to the digits they give.
PUBLISHED = {
    ("llama", "2_7b"): 6_738_415_616,
    ("llama", "2_13b"): 13_015_864_320,
    ("llama", "2_70b"): 68_976_648_192,
    ("llama", "8b"): 8_030_261_248,
    ("llama", "70b"): 70_553_706_496,
    ("llama", "3_1_405b"): 405_853_388_800,
    ("llama", "3_1_8b"): 8_030_261_248,
    ("llama", "3_2_1b"): 1_235_814_400,
    ("gpt2", "small"): 124_439_808,
    ("gpt2", "medium"): 354_823_168,
    ("gpt2", "large"): 774_030_080,
    ("gpt2", "xl"): 1_557_611_200,
    ("qwen2", "0_5b"): 494_032_768,
    ("qwen2", "1_5b"): 1_543_714_304,
    ("qwen2", "7b"): 7_615_616_512,
    # What transformers' models of these sizes hold, the untied heads of 1.1 and mT5 included.
    ("t5", "small"): 60_506_624,
    ("t5", "base"): 222_903_552,
    ("t5", "large"): 737_668_096,
    ("t5", "3b"): 2_851_598_336,
    ("t5", "11b"): 11_307_321_344,
    ("t5", "1_1_small"): 76_961_152,
    ("t5", "1_1_base"): 247_577_856,
    ("t5", "1_1_large"): 783_150_080,
    ("t5", "1_1_xl"): 2_849_757_184,
    ("t5", "1_1_xxl"): 11_135_332_352,
    ("t5", "mt5_small"): 300_176_768,
    ("t5", "mt5_base"): 582_401_280,
    ("t5", "mt5_large"): 1_229_581_312,
    ("t5", "mt5_xl"): 3_742_619_648,
    ("t5", "mt5_xxl"): 12_921_057_280,
}


@pytest.mark.parametrize(("family", "size"), PUBLISHED)
def test_released_sizes_have_their_published_number_of_parameters(family, size):
    assert cases.sized(family, size).parameter_count() == PUBLISHED[family, size]


def test_whatever_is_as_long_as_the_vocabulary_is_counted_without_its_padding():
    model = cases.model("llama", vocab_size=61, vocab_multiple=32)
    assert model.config.padded_vocab == 64
    before = model.parameter_count()
    # A head's bias: a third leaf with the vocabulary in it, which no family has yet.
    model.__dict__["_specs"] = model.specs() | {"bias": ParamSpec((64,), "float32", ("vocab",), "constant(0)")}
    assert model.parameter_count() == before + 61


def test_every_size_that_is_not_ours_is_checked():
    ours = {(family, size) for family in FAMILIES for size in ("tiny", "mini")} | {("llama", "small")}
    released = {(family, size) for family, (_, sizes) in FAMILIES.items() for size in sizes}
    assert released - ours == set(PUBLISHED)
