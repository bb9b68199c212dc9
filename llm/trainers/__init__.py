"""The training programs: one file, one command (`python -m llm.trainers.gpt`)."""
