"""Stands in for a module that the source distribution leaves out, so that the ones it has can be imported."""


class ExportTesterMixin:
    """No tests."""
