"""Floor 6: state, step, loop, evaluation, telemetry and faults."""
