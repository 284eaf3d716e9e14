"""Every family of models that transformers knows, tiny and random, on the engine: `python -m tests.zoo`."""
