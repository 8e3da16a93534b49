"""`python -m t5x_like`, but the train step of process HANGS_ON never comes back the sixth time.

For test_elastic.py: what becomes of a run whose device, or whose kernel, hangs.
"""

import dataclasses
import os
import sys
import time

from t5x_like.__main__ import main
from t5x_like.training import loop


def hang() -> None:
    train, calls = loop.train, []

    def hanging(given, *arguments, **named):
        step = given.step

        def stuck_in_the_step(state, frozen, batch):
            calls.append(None)
            if len(calls) == 6 and os.environ.get("JAX_PROCESS_ID", "0") == os.environ.get("HANGS_ON", "0"):
                time.sleep(600)
            return step(state, frozen, batch)

        return train(dataclasses.replace(given, step=stuck_in_the_step), *arguments, **named)

    loop.train = hanging


if __name__ == "__main__":
    hang()
    sys.exit(main())
