"""Every option, and the reader of command lines and TOML files. This package imports no torch."""

# The version of the distribution; setup.cfg reads it from here.
VERSION = "0.1.0"
