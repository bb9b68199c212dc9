"""Events from outside a run: stop signals, the walltime and stalled steps."""
