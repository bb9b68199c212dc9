"""Files and folders that are complete or do not exist."""
