"""Modules that are imported when they are first used: Polars takes 0.1 s, and a table does not need it."""

from importlib import import_module
from typing import Any


class Later:
    """Stands for a module until it is asked for something."""

    def __init__(self, name: str) -> None:
        """`name` is the module's, as in an import."""
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)
