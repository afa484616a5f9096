"""Each family does what the table in the documentation says of it; `python scripts/coverage.py` writes that table."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.families.checks import check
from tests.families.reload import new_process, what_is_wrong
from tests.families.rows import FAMILIES, is_missing, row_of
from tests.families.table import TABLE, as_markdown, committed


@pytest.fixture(scope="module")
def load() -> Iterator[Callable[[str, Path], str]]:
    with new_process() as process:
        yield lambda family, folder: process.submit(what_is_wrong, family, folder).result()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_is_right(family: str, load: Callable[[str, Path], str], tmp_path: Path) -> None:
    if is_missing(family):
        pytest.skip(f"needs {row_of(family).requires}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        finding = check(family, tmp_path, load)
    assert finding == committed()[family]


def test_the_table_is_made_from_the_results() -> None:
    findings = committed()
    assert list(findings) == list(FAMILIES)
    assert TABLE.read_text() == as_markdown(list(findings.values()))
