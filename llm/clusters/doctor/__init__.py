"""`python -m llm.launch doctor`: checks the hosts of a job before it trains."""
