"""Numbers and names as they are said to people."""

from __future__ import annotations

from collections.abc import Iterable


def counted(count: int, what: str) -> str:
    """`"1 task"`, `"2 tasks"`."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def quoted(names: Iterable[str]) -> str:
    """`"'a', 'b'"`."""
    return ", ".join(f"'{name}'" for name in names)


def shortened(name: str, longest: int = 40) -> str:
    """A name for a table, without its middle if it is long."""
    return name if len(name) <= longest else f"{name[: longest - 13]}…{name[-12:]}"
