"""Where text comes from: files, folders, the Hub and the Python library."""
