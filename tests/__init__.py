"""The tests. A regular package, so that the live ranks can import job functions by their dotted name."""
