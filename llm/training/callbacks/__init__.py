"""Work done between updates: records, evaluation, samples and checkpoints."""
