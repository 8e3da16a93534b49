"""Of the loop (t5x_like/training/loop.py)."""

from ml_collections.config_dict import placeholder


def loop() -> dict:
    return {
        "steps": 1000,
        "log_every_steps": 10,
        "micro_batches": 1,
        "ema_decay": placeholder(float),
        "on_nonfinite": "stop",
        "on_spike": "off",
        "spike_deviations": 6.0,
        "spike_memory": 0.99,
        "spike_warmup": 100,
    }
