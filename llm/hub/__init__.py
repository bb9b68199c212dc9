"""The Hugging Face Hub: whether it can be reached, names of models and data sets, and uploads."""
