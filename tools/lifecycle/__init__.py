"""Runs the stages of a lifecycle one after the other, and tells what each cost and gained: docs/lifecycle.md."""
