"""Tests of the partition table."""
