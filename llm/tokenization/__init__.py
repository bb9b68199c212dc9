"""Load or train a tokenizer, and encode text with it."""
