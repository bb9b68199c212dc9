"""The machine and the process: cores, memory, precision, timers, subprocesses, units and hashing."""
