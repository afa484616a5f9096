"""Folders for what several tests share, in pytest's own temporary folder, which it clears away."""

from __future__ import annotations

import tempfile
from pathlib import Path

root: Path | None = None  # set by `conftest.py`


def shared_folder(prefix: str) -> Path:
    """A new, empty folder, there to the end of the run."""
    assert root is not None
    return Path(tempfile.mkdtemp(prefix=prefix, dir=root))
