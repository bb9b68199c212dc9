"""Training from Python: `from llm import train, TrainOptions`."""
