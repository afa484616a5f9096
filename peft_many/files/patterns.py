r"""The regular expressions in an adapter's config: looked up without one where they are names, and timed if not.

PEFT matches `rank_pattern`, `target_modules` and others against module names with `re`, which can take longer than
anybody waits for a few characters such as `(\w+)+!`. No reading of a pattern tells for sure; trying it elsewhere does.
The package `regex` has a time limit, but gets done in no time with patterns that `re` does not.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from peft import PeftConfig
from peft.utils.other import get_pattern_key

from ..records import merge_of
from .errors import unusable_config

T = TypeVar("T")

SECONDS = 5.0  # for all patterns of an adapter on all names together
_QUICK_PAIRS = 2_000_000
# No repetition and no choice: as many steps as characters. What precedes it in PEFT, `(.*\.)?`, tries every dot.
_STEPWISE = re.compile(r"\^?(?:[\w.-]|\\[.\-_])*\$?")
# One repetition and one choice among words at most, as in the default `target_modules`: a tenth of a millisecond for
# the worst of these on a name.
_FEW_PAIRS, _SHORT = 20_000, 300
_CHARACTER = r"(?:[\w.-]|\\[.\-_b])"
_ONE_CHOICE = re.compile(rf"\^?{_CHARACTER}*(?:\.[*+]{_CHARACTER}*)?(?:\((?:\?:)?\w+(?:\|\w+)*\){_CHARACTER}*)?\$?")
_NAME = re.compile(r"(?:[\w-]|\\[.\-_])+")

_TRIAL = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for _, pattern, how in patterns:
    match = getattr(re.compile(pattern), how)
    for name in names:
        match(name)
"""


class ByPattern(Generic[T]):
    """What a `rank_pattern` or the like says of each layer, as PEFT's `get_pattern_key` does; the first match counts.

    Where all are names, they are looked up, as thousands of layers times thousands of expressions take minutes.
    """

    def __init__(self, pattern: Mapping[str, T] | None, default: T) -> None:
        self._default = default
        self._pattern = pattern or {}
        self._names: dict[str, str] = {}
        if all(_NAME.fullmatch(key) for key in self._pattern):
            for key in reversed(list(self._pattern)):  # the earlier of two that are spelt differently stays
                self._names[re.sub(r"\\(.)", r"\1", key)] = key
        self._order = {key: place for place, key in enumerate(self._pattern)}

    def __getitem__(self, layer: str) -> T:
        if not self._names:
            return self._pattern.get(get_pattern_key(list(self._pattern), layer), self._default)
        parts = layer.split(".")
        ends = (".".join(parts[i:]) for i in range(len(parts)))
        found = [self._names[end] for end in ends if end in self._names]
        return self._pattern[min(found, key=self._order.__getitem__)] if found else self._default


def exceptions_by_pattern(values: Mapping[str, T], usual: T | None) -> dict[str, T]:
    """The layers' values that are not the usual one, as a `rank_pattern` has them and [`ByPattern`] reads them."""
    return {re.escape(layer): value for layer, value in values.items() if value != usual}


def check_patterns(config: PeftConfig, names: Sequence[str], source: str, *, only_ranks: bool = False) -> None:
    """Raise `MalformedAdapterError` unless PEFT gets done with a config's regular expressions on these module names.

    `only_ranks` leaves out those that say which modules are adapted, which merging files never asks.
    """
    patterns = [*_ranks_as_peft_matches(config), *([] if only_ranks else _modules_as_peft_matches(config))]
    pairs = len(patterns) * len(names)
    doubtful = [one for one in patterns if pairs > _QUICK_PAIRS or not _STEPWISE.fullmatch(one[0])]
    is_short = all(len(part) <= _SHORT and _ONE_CHOICE.fullmatch(part) for part, *_ in doubtful)
    if is_short and len(doubtful) * len(names) <= _FEW_PAIRS:
        return
    reason = f"its regular expressions take more than {SECONDS:.0f} seconds on {len(names)} module names"
    try:
        # In a bare interpreter of its own, since a match cannot be interrupted from another thread.
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _TRIAL],
            input=json.dumps([doubtful, list(names)]).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=SECONDS,
            check=False,
        )
        if done.returncode == 0:
            return
        said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        reason = f"its regular expressions cannot be used ({said:.200})"
    except subprocess.TimeoutExpired:
        pass
    except OSError as error:
        reason = f"its regular expressions cannot be tried, as no process can be started here ({error})"
    raise unusable_config(source, reason)


def _ranks_as_peft_matches(config: Any) -> Iterable[tuple[str, str, str]]:
    """Each regular expression, what PEFT makes of it, and the method of `re` that it calls."""
    merge = merge_of(config)
    of_tasks = {} if merge is None else merge.task_rank_pattern
    for keys in (getattr(config, "rank_pattern", None), getattr(config, "alpha_pattern", None), of_tasks):
        for key in keys or {}:
            yield key, rf"(.*\.)?({key})$", "match"


def _modules_as_peft_matches(config: Any) -> Iterable[tuple[str, str, str]]:
    """Likewise, of those that say which modules are adapted."""
    for name in getattr(config, "modules_to_save", None) or []:
        yield name, rf"(^|.*\.){name}($|\..*)", "match"
    for field in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, field, None), str):
            yield getattr(config, field), getattr(config, field), "fullmatch"
    layers = getattr(config, "layers_pattern", None) or []
    for pattern in [layers] if isinstance(layers, str) else layers:
        yield pattern, rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", "match"
