"""Checkpoints: written, verified, found, and resumed from."""
