"""Files of results: JSON with the raw samples, Markdown made from them."""

from benchmarks.records import RESULTS, read, write

__all__ = ["RESULTS", "read", "write"]
