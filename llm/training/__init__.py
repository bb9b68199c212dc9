"""A training run: the loop, its updates, callbacks, checkpoints and records."""
