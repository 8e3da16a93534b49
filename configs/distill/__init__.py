"""Distillation runs."""
