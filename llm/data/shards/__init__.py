"""Token shards on disk: the format, its writer, memory-mapped reading and formats of other programs."""
