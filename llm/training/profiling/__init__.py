"""Measurements of a training step for `python -m llm.bench`."""
