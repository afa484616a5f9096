"""Errors about what is in an adapter's files: one printable line, whatever that is."""

from __future__ import annotations


class AdapterFileError(ValueError):
    """Something is wrong with an adapter's files; the message says which file, where and why.

    Names in them may hold line breaks, terminal commands, or what no terminal can print; messages show these escaped.
    """

    def __init__(self, message: str) -> None:
        shown = (character if character.isprintable() else repr(character)[1:-1] for character in message)
        super().__init__("".join(shown))


class UnmergeableAdapterError(AdapterFileError):
    """An adapter cannot be merged; the message says which, where and why."""


class MalformedAdapterError(UnmergeableAdapterError):
    """An adapter's files hold nonsense or contradict each other, so it is neither loaded nor merged."""


class StatisticsError(AdapterFileError):
    """A statistics file cannot be used; the message says which one, which tensor and why."""


def unusable_config(source: str, reason: str) -> MalformedAdapterError:
    """The error for a config that cannot be used, and why not."""
    return MalformedAdapterError(f"{source}: adapter_config.json cannot be used: {' '.join(reason.split())}.")
