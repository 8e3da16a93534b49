"""Of what a run tells (t5x_like/training/telemetry.py)."""


def telemetry() -> dict:
    return {
        "tensorboard": True,
        "plot": True,
        "plot_every_seconds": 60.0,
        "measure_cpu_peak": True,
        "profile": {"start_step": 10, "steps": 0},
        "wandb": {"project": "", "mode": "offline"},
        "mlflow": {"uri": "", "experiment": "t5x_like"},
    }
