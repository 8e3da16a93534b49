"""What a search found, as a config file: it loads, and it is the config with its overrides and the winner in it."""

import pathlib
import types

import pytest

from t5x_like.core.errors import UserError
from t5x_like.planner.search.index import JUDGED, Entry, Verdict
from t5x_like.planner.search.space import Point
from t5x_like.runs import pinning
from t5x_like.runs.arguments import call_function, load_config

PLACE = types.SimpleNamespace(name="v5e:2x4", slices=1)
POINT = Point("fsdp4-tensor2-dots", {"config.mesh.tensor": 2, "config.model.remat": "dots"})


def best(point=POINT):
    return Entry(point, JUDGED, verdict=Verdict(1.0, 2**30, "products", 0.5, 7))


@pytest.mark.parametrize(
    "overrides",
    [
        ['--config.runtime.compiler_options.tpu["xla_tpu_scoped_vmem_limit_kib"]=98304'],
        ["--config.runtime.compiler_options.tpu.xla_tpu_scoped_vmem_limit_kib=98304"],
        ["--config.model.scan=true", "--config.model.decoder.gated=False"],
        ["--config.model.max_length=128", "--config.optim.learning_rate=1"],
        ["--config.data.tokenizer=123"],
        ["--config.data.tokenizer=C:\\new"],
        ['--config.data.tokenizer=\'"""\\'],
    ],
    ids=lambda each: each[0],
)
@pytest.mark.parametrize("slices", [1, 2])
def test_a_pinned_file_is_the_config_with_its_overrides(tmp_path, overrides, slices):
    arguments, target = ["--config=pretrain/test", *overrides], tmp_path / "pinned.py"
    place = types.SimpleNamespace(name="v5e:2x4", slices=slices)
    pinning.write_pinned(target, arguments, best(), place)
    assert load_config([f"--config={target}"])[0] == load_config([*arguments, *POINT.flags])[0]
    assert call_function([f"--config={target}"], "get_launch")[1]["topology"] == "v5e:2x4"
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".py"] == ["pinned.py"]


def test_compiler_options_of_the_winner_are_pinned(tmp_path):
    point = Point("a", {"config.runtime.compiler_options.tpu.xla_a": "1"})
    pinning.write_pinned(tmp_path / "pinned.py", ["--config=pretrain/test"], best(point), PLACE)
    assert load_config([f"--config={tmp_path / 'pinned.py'}"])[0]["runtime"]["compiler_options"]["tpu"] == {"xla_a": 1}


def test_what_would_not_load_is_not_written(tmp_path, monkeypatch):
    for text, says in (("def get_config(:\n", "would not load"), (None, "would not be the config with its overrides")):
        base = pathlib.Path("configs/pretrain/small.py").resolve().read_text()
        monkeypatch.setattr(pinning, "_text", lambda *_, text=text or base, **__: text)
        with pytest.raises(UserError, match=says) as error:
            pinning.write_pinned(tmp_path / "pinned.py", ["--config=pretrain/test"], best(), PLACE)
        assert "\n" not in str(error.value) and not (tmp_path / "pinned.py").exists()
