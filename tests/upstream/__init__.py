"""transformers' own common model tests, run on our classes."""
