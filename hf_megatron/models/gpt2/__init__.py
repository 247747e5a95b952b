"""Tensor-parallel GPT-2."""
