"""A local copy of an adapter, and where it came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class AdapterSource:
    """A local copy of an adapter, and where it came from."""

    folder: Path
    name: str  # what the user called it: a path or a Hub id
    revision: str | None = None  # the commit, for a Hub repository

    @property
    def short_name(self) -> str:
        """The last part of the name, the default name of the task."""
        return Path(self.folder if self.revision is None else self.name).resolve().name

    @property
    def public_name(self) -> str:
        """What a merge's config and card call it: local paths are nobody else's business."""
        return self.short_name if self.revision is None else self.name
