"""Tests of the parallel layers, on live ranks against unsharded references."""
