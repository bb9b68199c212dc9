"""Shards to batches: blocks of tokens, shuffled order, mixtures of data sets and the loader."""
