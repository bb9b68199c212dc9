"""Measures of a model on batches of text."""
