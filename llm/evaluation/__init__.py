"""A model and batches in, numbers out."""
