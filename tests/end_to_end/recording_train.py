"""`python -m t5x_like`, but the rows that the process reads of each batch are also written to ROWS/PROCESS.jsonl, and
the parts that it writes of what a reference says, of REFERENCE_PART rows each, to ROWS/parts-PROCESS.txt.

For tests of two processes: what a process reads and writes is not to be seen from its losses alone.
"""

import json
import os
import sys

from t5x_like.__main__ import main
from t5x_like.data import reference_logp
from t5x_like.data.read import loader

_PROCESS = os.environ.get("JAX_PROCESS_ID", "0")


def record() -> None:
    path = os.path.join(os.environ["ROWS"], f"{_PROCESS}.jsonl")
    read = loader.TrainData.rows

    def rows(self, step, row_indices):
        with open(path, "a") as out:
            out.write(json.dumps([int(step), [int(row) for row in row_indices]]) + "\n")
        return read(self, step, row_indices)

    loader.TrainData.rows = rows


def record_parts() -> None:
    reference_logp.PART = int(os.environ.get("REFERENCE_PART", reference_logp.PART))
    path = os.path.join(os.environ["ROWS"], f"parts-{_PROCESS}.txt")
    write = reference_logp.Store.write

    def writes(self, part, numbers):
        with open(path, "a") as out:
            print(part, file=out)
        write(self, part, numbers)

    reference_logp.Store.write = writes


if __name__ == "__main__":
    record()
    record_parts()
    sys.exit(main())
