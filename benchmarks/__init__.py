"""Measurements side by side with other trainers, and their results as JSON. None of it is installed."""
