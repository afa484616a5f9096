"""The command line, `peft-many`: arguments, options, and what is printed.

A command enters if a public function does its work; what imports torch is imported only when that is called.
"""

from .app import app

__all__ = ["app"]
