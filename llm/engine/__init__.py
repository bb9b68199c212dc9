"""The run, the loop, one update, checkpoints, and tracking."""
