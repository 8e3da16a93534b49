"""Commands as a user calls them, in process, and what their runs leave."""

import json
import pathlib
import shutil

from t5x_like.__main__ import main
from t5x_like.storage import paths

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = "configs/pretrain/test.py"


def train(workdir: pathlib.Path, *arguments: str, config: str | None = CONFIG) -> int:
    chosen = [f"--config={config}"] if config else []
    return main(["train", *chosen, f"--workdir={workdir}", *arguments])


def rows(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def values(workdir: pathlib.Path) -> list[tuple]:
    """What must be equal between two runs: every row without time and rates."""
    kept = ("train/loss", "train/grad_norm", "train/learning_rate", "eval/validation/loss", "eval/validation/accuracy")
    return [(row["step"], *(row.get(name) for name in kept)) for row in rows(workdir)]


def sizes(workdir: pathlib.Path) -> dict[str, int]:
    """Every file but the lock, which says who looked last."""
    return {name: size for name, size in paths.tree_files(str(workdir)).items() if name != "lock"}


def unfinished(finished: pathlib.Path, folder: pathlib.Path, *, last: int = 12) -> pathlib.Path:
    """A copy that lost its last checkpoint (an earlier one than the last row), as a kill would leave it: of a run of 12
    steps that at 12, so that it stopped after 10."""
    workdir = folder / "run"
    shutil.copytree(finished, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(last))
    manifest = json.loads((workdir / "manifest.json").read_text())
    del manifest["finished"]
    (workdir / "manifest.json").write_text(json.dumps(manifest))
    return workdir
