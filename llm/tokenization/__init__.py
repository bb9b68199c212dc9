"""Load or train a tokenizer, and encode text with it."""

# A target with this id is not predicted and does not count towards the loss.
# Source: the default `ignore_index` of torch's cross entropy, and the value that transformers uses in `labels`.
IGNORE_INDEX = -100
