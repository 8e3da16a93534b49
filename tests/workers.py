"""Which tests share a worker of pytest-xdist: those of one file, as their fixtures share compiled programs, and those
of several files that load one heavy library, or may not load it at the same time.

The scheduler goes by names of files alone, since marks do not come through: pytest 9.2 gives items an id that
`--dist loadgroup` of pytest-xdist 3.8 cannot add a group to, so that it takes every test for a group of its own.
"""

from xdist.scheduler import LoadScopeScheduling

GROUPS = {
    # libtpu takes a lock: one process at a time.
    "libtpu": (
        "tests/end_to_end/test_loading.py",
        "tests/layers/attention/test_kernels.py",
        "tests/planner/test_compile.py",
        "tests/planner/test_meshes.py",
        "tests/planner/test_plan.py",
        "tests/planner/test_plan_rl.py",
        "tests/planner/test_shipped.py",
        "tests/planner/test_topology.py",
    ),
    # Importing one of these takes 5 to 10 seconds.
    "lm_eval": (
        "tests/end_to_end/test_bad_models.py",
        "tests/end_to_end/test_instruction.py",
        "tests/evaluation/test_backend.py",
        "tests/evaluation/test_command.py",
        "tests/evaluation/test_parity.py",
    ),
    "tensorflow": (
        "tests/data/write/test_bad_examples.py",
        "tests/data/write/test_chat_tasks.py",
        "tests/data/write/test_tensorflow_sources.py",
    ),
}
# Files that take longest on two cores: begun first, so that no worker is left alone with one of them.
LONGEST = (
    "tests/end_to_end/test_preferences.py",
    "tests/end_to_end/test_two_processes.py",
    "tests/end_to_end/test_rl.py",
    "tests/training/test_parity.py",
    "tests/training/test_faults.py",
    "tests/end_to_end/test_lora.py",
    "tests/end_to_end/test_rl_two_processes.py",
    "tests/end_to_end/test_encoder_decoder.py",
    "tests/end_to_end/test_crash.py",
    "tests/end_to_end/test_gcs_run.py",
)


def group(nodeid: str) -> str:
    file = nodeid.split("::")[0]
    return next((name for name, files in GROUPS.items() if file in files), file)


class ByGroup(LoadScopeScheduling):
    """For `--dist loadscope`."""

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)
