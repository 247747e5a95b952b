"""Stands in for a module that the source distribution leaves out, so that the ones it has can be imported."""


class GenerationTesterMixin:
    """No tests; a model test that lacks this base fails if its models can generate."""
