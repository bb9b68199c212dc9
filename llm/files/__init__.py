"""Files and folders that are finished or do not exist."""
