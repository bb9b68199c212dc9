"""llm-trainers: train a GPT-like model on text, and load it anywhere with `from_pretrained`.

Nothing is imported here, so that `--help` and mistakes in a command line take little time.
"""

__version__ = "0.1.0"
