"""Layers: pure pieces of a model. Nothing here knows of steps, files or objectives."""
