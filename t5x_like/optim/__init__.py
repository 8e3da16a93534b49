"""Optimizers, schedules, clipping and the rules by path that decide what they do to which parameter."""
