"""The version of moetrace, which stands here only."""

__version__ = "0.1.0"
