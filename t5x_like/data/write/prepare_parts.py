"""`prepare` on several machines over one shared folder or bucket: each writes the shards of its part, one finishes.

Which shards there are is a function of the data alone, so parts need no talk: part I of N takes every N-th shard, and
each machine finds the same ones. A part that is killed, or done twice, keeps the shards that are there. A tokenizer
that is to be trained comes out the same on each.
"""

import dataclasses
import time

from t5x_like.core.environment import cores
from t5x_like.core.errors import UserError
from t5x_like.data import cache, token_shards
from t5x_like.data.config import DataConfig
from t5x_like.data.write import memory, prepare, workers
from t5x_like.storage import paths


@dataclasses.dataclass(frozen=True)
class PartWritten:
    """Of one part of a cache: its shards, those that this call wrote, and the shards of all parts."""

    shards: int
    written: int
    total: int


def prepare_part(
    config: DataConfig, cache_dir: str, part: int, count: int, *, report: prepare.Report | None
) -> PartWritten:
    """Writes the shards of one of `count` parts of the cache, from 1; `finish` makes it complete.

    Any number of machines may do so at once over one shared or gs:// cache, and do one part twice.
    """
    prepare.check(config)
    folder = cache.local_folder(cache_dir)
    paths.make_directory(str(folder))
    cache.fetch_tokenizers(cache_dir)
    with workers.Pool(config.workers or cores()) as pool:
        share = memory.Share(paths.normal(cache_dir), part, count)
        _, tokenizer, plans = prepare.plan(config, folder, pool, report, "", share)
        cache.send_tokenizer(cache_dir, tokenizer)
        mine: dict[str, set[int]] = {plan.place.name: set() for plan in plans}
        every = [(plan.place.name, job["index"]) for plan in plans for job in plan.jobs]
        for name, index in every[part - 1 :: count]:
            mine[name].add(index)
        for name, shards in mine.items():
            cache.fetch_shards(cache_dir, name, shards)
        todo = [task for plan in plans for task in plan.todo(mine[plan.place.name])]
        written = prepare.run_jobs(todo, pool, config.workers, report)
    for name, shards in mine.items():
        cache.send_shards(cache_dir, name, shards)
    return PartWritten(sum(map(len, mine.values())), len(written), len(every))


def finish(config: DataConfig, cache_dir: str, *, report: prepare.Report | None) -> prepare.Prepared:
    """Declares a cache complete of which all parts are written. UserError, which names them, for missing shards."""
    prepare.check(config)
    started = time.monotonic()
    folder = cache.local_folder(cache_dir)
    paths.make_directory(str(folder))
    cache.fetch_tokenizers(cache_dir)
    with workers.Pool(config.workers or cores()) as pool:
        found, tokenizer, plans = prepare.plan(
            config, folder, pool, report, "", memory.Share(paths.normal(cache_dir), 1, 1)
        )
        for plan in plans:
            facts = cache.shard_facts(cache_dir, plan.place.name, [job["index"] for job in plan.jobs])
            missing = [job["index"] for job, there in zip(plan.jobs, facts, strict=True) if there is None]
            if missing:
                shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
                raise UserError(
                    f"{paths.join(cache_dir, plan.place.name)}: {len(missing)} of its {len(facts)} shards are missing "
                    f"({shown}); run `t5x_like prepare --part=I/N` again for the parts that did not end well"
                )
            plan.write_index([there for there in facts if there])
            token_shards.remove_leftovers(plan.place)
            cache.send_index(cache_dir, plan.place.name)
        manifest = prepare.manifest_of(config, folder, found, tokenizer, plans, pool)
    cache.write_manifest(config, cache_dir, manifest, parts_sent=True)
    return prepare.prepared(manifest, folder, found, [], started)
