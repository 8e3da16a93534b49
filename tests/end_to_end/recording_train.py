"""`python -m t5x_like`, but the rows that the process reads of each batch are also written to ROWS/PROCESS.jsonl.

For test_two_processes.py: what a process reads is not to be seen from its losses alone.
"""

import json
import os
import sys

from t5x_like.__main__ import main
from t5x_like.data.read import loader


def record() -> None:
    path = os.path.join(os.environ["ROWS"], f"{os.environ.get('JAX_PROCESS_ID', '0')}.jsonl")
    read = loader.TrainData.rows

    def rows(self, step, row_indices):
        with open(path, "a") as out:
            out.write(json.dumps([int(step), [int(row) for row in row_indices]]) + "\n")
        return read(self, step, row_indices)

    loader.TrainData.rows = rows


if __name__ == "__main__":
    record()
    sys.exit(main())
