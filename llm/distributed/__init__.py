"""Ranks that agree, gather and wait for each other."""
