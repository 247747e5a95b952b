"""The model classes, and their registration with transformers' Auto classes."""
