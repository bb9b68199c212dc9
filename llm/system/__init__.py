"""The machine that a process runs on: cores, memory, allocator, precision and subprocesses."""
