"""Text to batches of token ids: sources, token shards, shuffled blocks and streaming."""
