"""Text to token shards: chunking, tokenization in worker processes, and the token cache."""
