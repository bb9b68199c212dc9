"""The Hugging Face Hub: reachability, names of models and datasets, and uploads."""
