"""Tokenizers, models and their loss, FLOPs, and sampling."""
