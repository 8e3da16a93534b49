"""Of the process and its compiler (t5x_like/core/environment.py)."""


def runtime() -> dict:
    return {
        "platform": "",
        "threads": 0,
        "fake_devices": 0,
        "compiler_options": {
            # Matrix products by Eigen, which is faster than the default library here; see docs/log.md.
            "cpu": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"},
            "gpu": {},
            "tpu": {},
        },
        "heartbeat_seconds": 100,
        "shutdown_seconds": 300,
        "phase_seconds": {"start": 900.0, "compile": 3600.0, "step": 900.0, "evaluate": 3600.0, "save": 3600.0},
        "compilation_cache": "auto",
        "compilation_cache_bytes": 4 * 2**30,
    }
