"""Tests of the tables and of the cuts."""
