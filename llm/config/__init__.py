"""Every option, and the reader of command lines and TOML files. This package imports no torch."""
