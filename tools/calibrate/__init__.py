"""What `t5x_like plan` estimates of a step, held against published runs: docs/planner.md."""
