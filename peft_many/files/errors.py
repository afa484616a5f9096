"""Errors about what is in other people's files: one printable line, whatever that is."""

from __future__ import annotations


class AdapterFileError(ValueError):
    """Something is wrong with an adapter's files.

    Names in them may hold line breaks, terminal commands, or what no terminal can print; messages show these escaped.

    Args:
        message (`str`): Which file, where and why.
    """

    def __init__(self, message: str) -> None:
        shown = (character if character.isprintable() else repr(character)[1:-1] for character in message)
        super().__init__("".join(shown))
