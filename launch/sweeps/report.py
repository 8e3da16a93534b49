"""What a sweep leaves for people in its folder: results.md, .json and .csv, curves.png and a plot of each field."""

from launch.sweeps import plots, results
from launch.sweeps.index import Index
from t5x_like.storage import paths


def write(index: Index, *, metric: str = "", goal: str = "") -> str:
    """Writes all of it, from the workdirs as they are; the table as Markdown."""
    found = results.outcomes_of(index)
    table = results.table(index, found, metric=metric, goal=goal)
    results.write(table, index.folder)
    for name, image in plots.images(table, found).items():
        paths.write_bytes_atomic(paths.join(index.folder, name), image)
    return results.markdown(table, paths.base_name(index.folder))
