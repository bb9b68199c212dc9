"""Every option, and the reader of command lines and TOML files. Imports no torch."""
