"""Model cards and pictures of the curves of a run."""
