"""The world of the tests: 8 CPU devices, no network, rank promotion raises, one compilation cache kept between runs.

The cache lies outside the checkout, in a folder named by the CPU's features and the versions, since a compiled
program belongs to both. Fixtures of single subjects stand beside their tests, not here.
"""

import os
import pathlib
import shutil

import pytest

from t5x_like.core.environment import cache_folder, cores

PLATFORM = os.environ.get("T5X_LIKE_TEST_PLATFORM", "cpu")  # cuda or tpu: for the tests marked so, and only those
MAX_CACHE_BYTES = 4 * 2**30


def _cache_folder() -> pathlib.Path:
    folder = cache_folder(cores())
    root = os.environ.get("T5X_LIKE_TEST_CACHE") or folder.parent.with_name("tests")
    return pathlib.Path(root, f"{PLATFORM}-{folder.name}")


CACHE = _cache_folder()

# For this process and for the children that tests start. All of it stands before the first import of jax.
os.environ["JAX_PLATFORMS"] = PLATFORM
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax  # noqa: E402
import jaxtyping  # noqa: E402

import tests.shapes  # noqa: E402, F401

# Where arrays are handled, the shapes in signatures are checked at every call; production runs without.
_CHECKED = ("layers", "models", "objectives", "optim", "inference")
if not os.environ.get("T5X_LIKE_TEST_UNCHECKED"):
    jaxtyping.install_import_hook([f"t5x_like.{name}" for name in _CHECKED], "tests.shapes.check")

if PLATFORM == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_sessionstart(session: pytest.Session) -> None:
    """A cache that outgrew its limit is started anew. Only the process that the workers belong to looks."""
    if hasattr(session.config, "workerinput") or not CACHE.is_dir():
        return
    if sum(entry.stat().st_size for entry in CACHE.iterdir() if entry.is_file()) > MAX_CACHE_BYTES:
        shutil.rmtree(CACHE, ignore_errors=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Asked of the process that the workers belong to; without xdist nobody asks."""
    from tests.workers import ByGroup

    return ByGroup(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first, where there are workers to give them to."""
    if hasattr(config, "workerinput"):
        from tests.workers import LONGEST

        places = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.nodeid.split("::")[0], len(places)))


def pytest_warning_recorded(warning_message) -> None:
    """jax warns about a damaged cache entry, compiles, and leaves the damage: remove the entries of that program."""
    text = str(warning_message.message)
    if text.startswith("Error reading persistent compilation cache entry for '"):
        module = text.split("'")[1]
        for entry in CACHE.glob(f"{module}-*"):
            entry.unlink(missing_ok=True)
