"""Ranks that agree, gather and wait; the network."""
