"""`t5x_like rl --config=FILE --workdir=DIR`: a policy learns from rewards of its own answers, or goes on to.

    t5x_like rl --config=configs/rl/reverse.py --workdir=runs/reverse
    t5x_like rl --config=... --workdir=... --check    builds everything, prints the summary and exits

A resume of a run whose config file has functions (verifiers, prompts) gives --config again: a workdir holds no code.
Exit status 75: the run was asked to stop and has saved; start it again. docs/rl.md says more.
"""

from collections.abc import Sequence

from t5x_like.commands.train import begin


def run(arguments: Sequence[str]) -> int:
    started = begin(arguments, prog="t5x_like rl", description=__doc__, own="rl")

    from t5x_like.runs import rl
    from t5x_like.runs.functions import named_functions
    from t5x_like.training.session import Request

    config, functions, places = named_functions(started.config)
    return rl.run(
        Request(**vars(started.options)),
        config=config,
        functions=rl.Functions(functions, places),
        overrides=started.overrides,
        stored=started.stored,
        environment=started.environment,
    )
