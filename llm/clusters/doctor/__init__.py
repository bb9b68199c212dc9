"""`python -m llm.launch --doctor`: checks of the hosts of a job before it trains."""
