"""Configs of runs that learn from preferences: reward models and DPO."""
