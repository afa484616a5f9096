"""The command line, `peft-many`."""

from .app import app

__all__ = ["app"]
