"""A pytest plugin that `run.py` loads into PEFT's tests: offline, and with `MAnyConfig` as `LoraConfig` if asked for.

The environment says what to do: `PEFT_SUITE_REPLACE=1` replaces `LoraConfig`; of the tests that concern LoRA,
`PEFT_SUITE_ONLY` names a JSON file with the ids of those to run, or `PEFT_SUITE_BUT` one with those not to run;
`PEFT_SUITE_RESULTS` names the file for the results.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import pkgutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


class _Absent(types.ModuleType):
    """Stands in for a package that the tests import but that is not installed; all it has are empty classes."""

    __version__ = "0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


if importlib.util.find_spec("diffusers") is None:
    sys.modules["diffusers"] = _Absent("diffusers")

if importlib.util.find_spec("attr") is None:
    # `peft.tuners.lora.corda` imports it without PEFT depending on it.
    sys.modules["attr"] = types.ModuleType("attr")
    sys.modules["attr"].dataclass = dataclasses.dataclass

import peft  # noqa: E402

REPLACE = os.environ.get("PEFT_SUITE_REPLACE") == "1"

if REPLACE:
    import peft_many

    # All of it, so that no module of ours takes `LoraConfig` from `peft` after the replacement.
    for module in pkgutil.walk_packages(peft_many.__path__, "peft_many."):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError):
                importlib.import_module(module.name)
    # Only what the tests import. PEFT's own modules take the class from where it is defined.
    peft.LoraConfig = peft_many.MAnyConfig

CONFIG: Any = peft.LoraConfig

_made_one = False
_original_post_init = CONFIG.__post_init__


def _noting_post_init(self: Any) -> None:
    global _made_one
    _made_one = _made_one or type(self) is CONFIG
    _original_post_init(self)


CONFIG.__post_init__ = _noting_post_init


def _id(nodeid: str) -> str:
    """The id that a test has in both runs: parameters that are classes are called by their names."""
    return nodeid.replace("MAny", "Lora")


@contextlib.contextmanager
def _stay_offline(model_id: str) -> Iterator[None]:
    yield


def pytest_sessionstart(session: pytest.Session) -> None:
    # The tests go online for the first use of each model; here all there is lies in the cache.
    importlib.import_module("tests.testing_utils").hub_online_once = _stay_offline


def _concerns_lora(item: pytest.Item) -> bool:
    call = getattr(item, "callspec", None)
    values = call.params.values() if call else ()
    configs = [value for value in values if isinstance(value, type) and issubclass(value, peft.PeftConfig)]
    return not configs or CONFIG in configs


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if _concerns_lora(item)]
    for variable, wanted in (("PEFT_SUITE_ONLY", True), ("PEFT_SUITE_BUT", False)):
        if variable in os.environ:
            named = set(json.loads(Path(os.environ[variable]).read_text()))
            items[:] = [item for item in items if (_id(item.nodeid) in named) == wanted]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: Any) -> Any:
    global _made_one
    _made_one = False
    return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> None:
    if _made_one and ("made_config", True) not in item.user_properties:
        item.user_properties.append(("made_config", True))


_results: dict[str, dict[str, Any]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    result = _results.setdefault(
        _id(report.nodeid), {"outcome": "passed", "made_config": False, "why": "", "seconds": 0.0}
    )
    result["seconds"] += report.duration
    result["made_config"] |= ("made_config", True) in report.user_properties
    if report.outcome != "passed":
        result["outcome"] = report.outcome
        result["why"] = report.longreprtext[-3000:]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        Path(os.environ["PEFT_SUITE_RESULTS"]).write_text(json.dumps(_results, indent=1))
