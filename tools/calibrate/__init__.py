"""Held against published figures: what `t5x_like plan` estimates of a step: python -m tools.calibrate, docs/planner.md."""
