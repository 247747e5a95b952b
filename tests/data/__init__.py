"""Tests of the data for training."""
