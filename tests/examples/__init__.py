"""Tests of the examples, by their command lines."""
