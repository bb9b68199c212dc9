"""The folder of a run: its files, console output, metrics and status."""
