"""llm-trainers: from text to a GPT-like model that anyone can load with `from_pretrained`.

Nothing is imported here, so that `--help` and mistakes in a command line cost no time.
"""

__version__ = "0.1.0"
